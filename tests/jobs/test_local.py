"""The work engine: resumes after kills, keeps its journal readable, names what failed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blm.jobs import WorkUnit, read_journal, run_units
from blm.types import BlmError, UnknownNameError

_SETTING: list[str] = []


def square(payload: tuple[int, str]) -> dict[str, Any]:
    """Leaves a trace of every run, so that tests can count them."""
    number, folder = payload
    with Path(folder, f"{number}.ran").open("a") as trace:
        trace.write("x")
    return {"square": number**2}


def die_once(payload: tuple[int, str]) -> dict[str, Any]:
    """Unit 2 kills its worker process the first time."""
    number, folder = payload
    mark = Path(folder, "died")
    if number == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return square(payload)


def die_always(payload: tuple[int, str]) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def die_on_two(payload: tuple[int, str]) -> dict[str, Any]:
    if payload[0] == 2:
        with Path(payload[1], "deaths").open("a") as trace:
            trace.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    return square(payload)


def leave(status: int) -> None:
    os._exit(status)


def refuse() -> None:
    raise RuntimeError("no such thing")


def unpicklable_result(payload: Any) -> dict[str, Any]:
    return {"function": lambda: 0}


def unpicklable_error(payload: Any) -> dict[str, Any]:
    class LocalError(Exception):
        pass

    raise LocalError("of its own kind")


def slow(payload: tuple[int, str]) -> dict[str, Any]:
    Path(payload[1], f"{os.getpid()}.pid").write_text(str(os.getpid()))
    time.sleep(0.5)
    return square(payload)


def find_no_space(payload: tuple[int, str]) -> dict[str, Any]:
    raise OSError(errno.ENOSPC, "No space left on device")


def fail_on_two(payload: tuple[int, str]) -> dict[str, Any]:
    if payload[0] == 2:
        raise ValueError("two is too much")
    return square(payload)


def refuse_two(payload: tuple[int, str]) -> dict[str, Any]:
    if payload[0] == 2:
        raise BlmError("two is too much")
    return square(payload)


def remember(setting: str) -> None:
    _SETTING.append(setting)


def recall(payload: int) -> dict[str, Any]:
    return {"setting": _SETTING, "threads": os.environ.get("OMP_NUM_THREADS")}


def units(folder: Path, n: int = 5) -> list[WorkUnit]:
    return [WorkUnit(f"u{i}", (i, str(folder))) for i in range(n)]


def runs(folder: Path) -> list[int]:
    return [len((folder / f"{i}.ran").read_text()) if (folder / f"{i}.ran").exists() else 0 for i in range(5)]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_unit_runs_once_and_results_come_in_unit_order(tmp_path: Path, workers: int) -> None:
    results = run_units(square, units(tmp_path), journal=tmp_path / "j.jsonl", workers=workers)
    assert list(results.items()) == [(f"u{i}", {"square": i * i}) for i in range(5)]
    again = run_units(square, units(tmp_path), journal=tmp_path / "j.jsonl", workers=workers)
    assert again == results
    assert runs(tmp_path) == [1] * 5


def test_a_killed_worker_costs_nothing_but_time(tmp_path: Path) -> None:
    results = run_units(die_once, units(tmp_path), journal=tmp_path / "j.jsonl", workers=2)
    assert results == {f"u{i}": {"square": i * i} for i in range(5)}
    assert (tmp_path / "died").exists()
    assert read_journal(tmp_path / "j.jsonl") == results
    assert len((tmp_path / "j.jsonl").read_text().splitlines()) == 5


def test_units_that_keep_killing_workers_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blm.jobs.ATTEMPTS", 2)
    with pytest.raises(
        BlmError, match=r"2 of 2 work units were given up.*'u0' killed its worker \(signal 9\)"
    ):
        run_units(die_always, units(tmp_path, 2), journal=tmp_path / "j.jsonl", workers=1)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_unit_that_kills_its_workers_is_given_up_and_the_others_finish(
    tmp_path: Path, workers: int
) -> None:
    journal = tmp_path / "j.jsonl"
    with pytest.raises(BlmError, match=r"1 of 5 work units .*'u2' killed its worker \(signal 9\), 3 times"):
        run_units(die_on_two, units(tmp_path), journal=journal, workers=workers)
    assert runs(tmp_path) == [1, 1, 0, 1, 1] and len((tmp_path / "deaths").read_text()) == 3
    assert set(read_journal(journal)) == {"u0", "u1", "u3", "u4"}
    (failure,) = [row for row in map(json.loads, journal.read_text().splitlines()) if "failure" in row]
    assert failure["key"] == "u2" and "3 times" in failure["failure"]
    results = run_units(square, units(tmp_path), journal=journal, workers=workers)
    assert results["u2"] == {"square": 4} and runs(tmp_path) == [1, 1, 1, 1, 1]
    assert run_units(die_always, units(tmp_path), journal=journal, workers=workers) == results


def test_a_set_up_that_dies_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(BlmError, match=r"the set-up of a worker failed.*exit status 3"):
        run_units(square, units(tmp_path), journal=tmp_path / "j.jsonl", setup=leave, setup_args=(3,))
    with pytest.raises(RuntimeError, match="the set-up of a worker failed: no such thing"):
        run_units(square, units(tmp_path), journal=tmp_path / "j.jsonl", setup=refuse)


@pytest.mark.parametrize("work", ["unpicklable_result", "unpicklable_error"])
def test_unpicklable_errors_are_reported_as_text(tmp_path: Path, work: str) -> None:
    with pytest.raises(RuntimeError, match="work unit 'u0' failed"):
        run_units(globals()[work], units(tmp_path, 1), journal=tmp_path / "j.jsonl", workers=1)


@pytest.mark.parametrize("workers", [-1, 10**9])
def test_a_number_of_workers_out_of_range_is_refused(tmp_path: Path, workers: int) -> None:
    with pytest.raises(BlmError, match=rf"workers is {workers}; it must be 0"):
        run_units(square, units(tmp_path), journal=tmp_path / "j.jsonl", workers=workers)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"notes without an end", b"a\nb", b'{"mine": 1}\n{"half'])
def test_a_file_of_others_in_the_journals_place_is_not_cut(tmp_path: Path, content: bytes) -> None:
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(content)
    with pytest.raises(BlmError, match=r"is damaged.*move it away"):
        run_units(square, units(tmp_path), journal=journal, workers=0)
    assert journal.read_bytes() == content


def start(name: str, folder: Path) -> subprocess.Popen[str]:
    """Call a function of this file in a new process."""
    code = f"import sys, pathlib, tests.jobs.test_local as t; t.{name}(pathlib.Path(sys.argv[1]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])},
        stderr=subprocess.PIPE,
        text=True,
    )


def run_slowly(folder: Path) -> None:
    run_units(slow, units(folder), journal=folder / "j.jsonl", workers=2)


def run_on_a_full_disk(folder: Path) -> None:
    """There is room for two lines and a half; the last write takes what fits, and the next one fails."""
    line = len(json.dumps({"key": "u0", "result": {"square": 0}})) + 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * line + line // 2, resource.RLIM_INFINITY))
    run_units(square, units(folder), journal=folder / "j.jsonl", workers=0)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_leaves_no_workers_and_continues(tmp_path: Path, how: signal.Signals) -> None:
    journal = tmp_path / "j.jsonl"
    process = start("run_slowly", tmp_path)
    while not read_journal(journal):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(how)
    process.communicate(timeout=120)
    assert process.returncode == -how
    workers = {int(p.read_text()) for p in tmp_path.glob("*.pid")}
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, f"workers {workers} are left"
        time.sleep(0.05)
    done = read_journal(journal)
    results = run_units(square, units(tmp_path), journal=journal, workers=0)
    assert len(workers) == 2 and 0 < len(done) < 5
    assert len(journal.read_text().splitlines()) == 5
    assert all(results[key] == result for key, result in done.items())


def test_a_full_disk_ends_the_run_and_keeps_whole_lines(tmp_path: Path) -> None:
    errors = start("run_on_a_full_disk", tmp_path).communicate(timeout=120)[1]
    assert "BlmError: cannot write to the journal" in errors
    assert "finished units are kept" in errors
    text = (tmp_path / "j.jsonl").read_text()
    assert [json.loads(line)["key"] for line in text.splitlines()] == ["u0", "u1"]
    assert text.endswith("\n")
    run_units(square, units(tmp_path), journal=tmp_path / "j.jsonl", workers=0)
    assert runs(tmp_path) == [1, 1, 2, 1, 1]


def test_a_full_disk_under_a_unit_is_no_fault_of_the_program(tmp_path: Path) -> None:
    with pytest.raises(BlmError, match=r"work unit 'u0' failed: .*No space left"):
        run_units(find_no_space, units(tmp_path), journal=tmp_path / "j.jsonl", workers=0)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BlmError, match=r"cannot write the journal '.*file/j.jsonl'"):
        run_units(square, units(tmp_path), journal=tmp_path / "file" / "j.jsonl", workers=0)


def test_a_journal_in_use_is_left_alone(tmp_path: Path) -> None:
    journal = tmp_path / "j.jsonl"
    with journal.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BlmError, match="another run is using"):
            run_units(square, units(tmp_path), journal=journal, workers=0)
    assert run_units(square, units(tmp_path), journal=journal, workers=0)["u2"] == {"square": 4}


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j.jsonl").write_bytes(b"\0\0\0\n")
    with pytest.raises(BlmError, match="is damaged"):
        run_units(square, units(tmp_path), journal=tmp_path / "j.jsonl", workers=0)


def test_an_unknown_engine_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown engine 'rey'. Did you mean 'ray'\?"):
        run_units(square, units(tmp_path), journal=tmp_path / "j.jsonl", workers=0, engine="rey")


def test_a_cut_last_line_is_removed_and_its_unit_runs_again(tmp_path: Path) -> None:
    journal = tmp_path / "j.jsonl"
    run_units(square, units(tmp_path), journal=journal, workers=0)
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-7])
    assert set(read_journal(journal)) == {"u0", "u1", "u2", "u3"}
    assert whole.startswith(journal.read_bytes())
    run_units(square, units(tmp_path), journal=journal, workers=0)
    assert runs(tmp_path) == [1, 1, 1, 1, 2]
    assert [json.loads(line)["key"] for line in journal.read_text().splitlines()] == [
        f"u{i}" for i in range(5)
    ]


def test_no_journal_means_nothing_finished(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "none.jsonl") == {}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("work", "kind"), [(fail_on_two, RuntimeError), (refuse_two, BlmError)])
def test_an_exception_names_its_unit_and_keeps_what_finished(
    tmp_path: Path, workers: int, work: Callable[[Any], dict[str, Any]], kind: type[Exception]
) -> None:
    journal = tmp_path / "j.jsonl"
    with pytest.raises(kind, match="work unit 'u2' failed: two is too much"):
        run_units(work, units(tmp_path), journal=journal, workers=workers)
    assert {"u0", "u1"} <= set(read_journal(journal))
    results = run_units(square, units(tmp_path), journal=journal, workers=0)
    assert [results[f"u{i}"]["square"] for i in range(5)] == [0, 1, 4, 9, 16]


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    twice = [WorkUnit("same", 1), WorkUnit("same", 2)]
    with pytest.raises(BlmError, match="duplicate keys"):
        run_units(square, twice, journal=tmp_path / "j.jsonl", workers=0)


def test_setup_runs_once_in_each_worker_with_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    work = [WorkUnit(str(i), i) for i in range(3)]
    results = run_units(
        recall, work, journal=tmp_path / "j.jsonl", workers=1, setup=remember, setup_args=("hello",)
    )
    assert results == {str(i): {"setting": ["hello"], "threads": "1"} for i in range(3)}
    assert os.environ["OMP_NUM_THREADS"] == "7"
