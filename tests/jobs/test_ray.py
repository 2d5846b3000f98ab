"""The Ray engine gives what the local engine gives, through killed workers, lost nodes and interrupted runs.

Every run is a process of its own that calls a function of this file: Ray leaves threads and handlers behind.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blm import jobs
from blm.jobs import WorkUnit, read_journal, run_units
from blm.types import BlmError

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra blm[ray]")
UNITS = 8
_BEGUN: list[str] = []


def begin(greeting: str) -> None:
    _BEGUN.append(greeting)


def work(payload: tuple[int, Path]) -> dict[str, Any]:
    """Write a product as units do, and leave a trace of every run and of every worker."""
    number, folder = payload
    with (folder / f"{number}.runs").open("a") as trace:
        trace.write(f"{os.getpid()}\n")
    time.sleep(0.1)
    part = folder / f".{number}.{os.getpid()}"
    part.write_text(f"product {number}")
    part.replace(folder / f"{number}.txt")
    return {"square": number**2, "begun": _BEGUN, "threads": os.environ.get("OMP_NUM_THREADS")}


def die_once(payload: tuple[int, Path]) -> dict[str, Any]:
    """Unit 3 takes its worker with it, the first time, with half of its product written."""
    number, folder = payload
    mark = folder / "died"
    if number == 3 and not mark.exists():
        mark.touch()
        (folder / f".{number}.{os.getpid()}").write_text("prod")
        os.kill(os.getpid(), signal.SIGKILL)
    return work(payload)


def die_always(payload: tuple[int, Path]) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def fail_on_three(payload: tuple[int, Path]) -> dict[str, Any]:
    if payload[0] == 3:
        raise BlmError("three is too much")
    return work(payload)


def linger(payload: tuple[int, Path]) -> dict[str, Any]:
    time.sleep(0.5)
    return work(payload)


def meet(payload: tuple[int, Path]) -> dict[str, Any]:
    """Wait until two workers are at work."""
    (payload[1] / f"worker.{os.getpid()}").touch()
    while len(list(payload[1].glob("worker.*"))) < 2:
        time.sleep(0.05)
    return linger(payload)


def run(
    job: Callable[[Any], dict[str, Any]], folder: Path, on: str = "ray", workers: int = 2
) -> dict[str, Any]:
    units = [WorkUnit(f"u{i}", (i, folder)) for i in range(UNITS)]
    how: dict[str, Any] = {"setup": begin, "setup_args": ("hello",), "engine": on, "workers": workers}
    return run_units(job, units, journal=folder / "journal.jsonl", **how)


# --- what the processes run ---------------------------------------------------------------------------------


def survive(folder: Path) -> None:
    """A worker dies; then the finished run is asked for again; then units fail."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)  # one for all runs: it takes seconds
    results = run(die_once, folder)
    again = run(die_always, folder)  # there is nothing left to do
    jobs.ATTEMPTS = 2
    errors = []
    for bad in (fail_on_three, die_always):
        (folder / bad.__name__).mkdir()
        try:
            run(bad, folder / bad.__name__, workers=1)
        except BlmError as error:
            errors.append(str(error))
    assert ray.is_initialized(), "a cluster that the caller started was stopped"
    (folder / "said.json").write_text(json.dumps({"results": results, "again": again, "errors": errors}))


def lose_a_node(folder: Path) -> None:
    """Two nodes of one worker each; the second is killed as soon as it works."""
    import threading

    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address

    def kill() -> None:
        while len(list(folder.glob("worker.*"))) < 2:
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    results = run(meet, folder)
    killer.join()
    (folder / "said.json").write_text(json.dumps(results))
    cluster.shutdown()


def collect_two_cells(out: Path, **how: Any) -> None:
    from blm.planner import CollectConfig, collect  # not above: simulators would load in every process here

    cells: dict[str, Any] = {"robots": ("panda", "xarm6"), "tasks": ("push_cube",), "episodes": 1}
    collect(CollectConfig(cameras=(), **cells, **how), out)


def collect_on_ray(folder: Path) -> None:
    """In a cluster of its own, which is gone afterwards; paths are relative, as users write them."""
    os.chdir(folder)
    collect_two_cells(Path("ray"), engine="ray")
    import ray

    assert not ray.is_initialized()


def be_interrupted(folder: Path) -> None:
    run(linger, folder)


# --- the tests ----------------------------------------------------------------------------------------------


def start(name: str, folder: Path, **variables: str) -> subprocess.Popen[str]:
    """Call a function of this file in a new process."""
    code = f"import sys, pathlib, tests.jobs.test_ray as t; t.{name}(pathlib.Path(sys.argv[1]))"
    environment_variables = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | variables
    environment_variables["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, str(folder)],
        env=environment_variables,
        stdout=subprocess.DEVNULL,  # Ray says here that a worker died
        stderr=subprocess.PIPE,
        text=True,
    )


def call(name: str, folder: Path) -> Any:
    """Call a function of this file in a new process; return what it wrote to said.json, if it did."""
    process = start(name, folder)
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 0, errors
    said = folder / "said.json"
    return json.loads(said.read_text()) if said.exists() else None


def journal_keys(folder: Path) -> list[str]:
    return [json.loads(line)["key"] for line in (folder / "journal.jsonl").read_text().splitlines()]


def pids(folder: Path) -> set[int]:
    return {int(pid) for file in folder.glob("*.runs") for pid in file.read_text().split()}


@needs_ray
@pytest.mark.slow
def test_a_killed_worker_costs_nothing_and_errors_name_their_units(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "ray").mkdir()
    said = call("survive", tmp_path / "ray")
    expected = run(work, tmp_path / "local", on="local")
    assert (tmp_path / "ray" / "died").exists()
    assert (
        said["results"]
        == expected
        == {f"u{i}": {"square": i * i, "begun": ["hello"], "threads": "1"} for i in range(UNITS)}
    )
    assert said["again"] == expected
    assert sorted(journal_keys(tmp_path / "ray")) == sorted(expected)
    for i in range(UNITS):
        assert (tmp_path / "ray" / f"{i}.txt").read_text() == f"product {i}"
        assert len((tmp_path / "ray" / f"{i}.runs").read_text().split()) == 1
    assert said["errors"][0] == "work unit 'u3' failed: three is too much"
    assert "work units were given up" in said["errors"][1] and "cost 2 Ray workers" in said["errors"][1]
    assert "u3" not in journal_keys(tmp_path / "ray" / "fail_on_three")


@needs_ray
def test_demonstrations_are_the_same_bytes_as_from_the_local_engine(tmp_path: Path) -> None:
    call("collect_on_ray", tmp_path)
    collect_two_cells(tmp_path / "local", workers=0)
    for robot in ("panda", "xarm6"):
        files = [tmp_path / how / robot / "data/chunk-000/file-000.parquet" for how in ("ray", "local")]
        assert files[0].read_bytes() == files[1].read_bytes()


@needs_ray
@pytest.mark.slow
def test_a_lost_node_costs_nothing(tmp_path: Path) -> None:
    results = call("lose_a_node", tmp_path)
    assert [results[f"u{i}"]["square"] for i in range(UNITS)] == [i * i for i in range(UNITS)]
    assert sorted(journal_keys(tmp_path)) == sorted(results)


@needs_ray
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_ends_its_workers_and_continues(tmp_path: Path, how: signal.Signals) -> None:
    process = start("be_interrupted", tmp_path)
    while len(read_journal(tmp_path / "journal.jsonl")) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(how)
    process.communicate(timeout=120)
    assert process.returncode == -how
    deadline = time.monotonic() + 60
    while alive := [pid for pid in pids(tmp_path) if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"workers {alive} are left"
        time.sleep(0.1)
    done = set(read_journal(tmp_path / "journal.jsonl"))
    results = run(work, tmp_path, on="local")
    assert sorted(journal_keys(tmp_path)) == sorted(results)
    for key in done:
        assert len((tmp_path / f"{key[1:]}.runs").read_text().split()) == 1


@needs_ray
def test_an_address_where_nothing_listens_is_named(tmp_path: Path) -> None:
    process = start("be_interrupted", tmp_path, RAY_ADDRESS="127.0.0.1:9")
    errors = process.communicate(timeout=120)[1]
    assert "BlmError: no Ray cluster answers at RAY_ADDRESS '127.0.0.1:9'" in errors


def test_ray_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BlmError, match=r"pip install 'blm\[ray\]'"):
        run(work, tmp_path)
