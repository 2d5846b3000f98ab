"""Two processes (gloo) fill one hidden-state cache, and refuse to work on different files.

This file is also the program of each process.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blm.backbone.backbone import Backbone
from blm.datasets.lerobot import EpisodeDataset, open_dataset
from blm.jobs import WorkUnit, read_journal
from blm.training.caches import files
from blm.training.caches import processes as cache_processes
from blm.training.caches.processes import wait_for_shards
from blm.training.loop.distributed import Processes
from blm.training.loop.loop import LoopConfig
from blm.training.policy import cache_workers
from blm.training.policy.cache_workers import FrameWorkers
from blm.training.policy.hashed_backbone import HashedBackbone
from blm.training.policy.hidden_state_cache import ALONE, CachedHiddenStates, cache_hidden_states
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.policy.projection import FILE, open_projection
from blm.training.policy.prompt_features import cache_prompts
from blm.training.policy.quantization import TokenCodec
from blm.training.run_inputs import run_together
from blm.training.sft.tokenize_corpora import TrainingSource
from blm.training.sft.train import Stage1Config, train_stage1
from blm.types import BlmError, Message
from tests.support.hidden_states import make_backbone, make_dataset

CONFIG = HiddenStateConfig(layer=1, cameras=("base",), batch_size=8, workers=0, shard_frames=10)
SHARDS = 5
LENGTHS = (12,) * SHARDS


def fill(world: Path, folder: Path, processes: Processes = ALONE) -> CachedHiddenStates:
    return cache_hidden_states(load(world), open_dataset(world / "arm"), CONFIG, folder, processes)


def load(world: Path, **options: Any) -> HashedBackbone:
    source = str(world / "backbone")
    return HashedBackbone.of(Backbone.load(source, **options), source)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_backbone(folder / "backbone")
    make_dataset(folder, lengths=LENGTHS)
    make_dataset(folder / "other", lengths=(11, *LENGTHS[1:]))
    return folder


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> CachedHiddenStates:
    return fill(world, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def two(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes worked, with what each of them reports."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared |= {"BLM_PROCESS_TIMEOUT": "60", "PYTHONPATH": str(Path(__file__).parents[3])}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(world), str(out)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=150)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(error[-4000:] for error in errors)
    return out


def reports(two: Path, name: str) -> list[str]:
    return [json.loads((two / f"report-{rank}.json").read_text())[name] for rank in range(2)]


def test_each_process_computes_its_own_shards(world: Path, alone: CachedHiddenStates, two: Path) -> None:
    journals = [read_journal(two / "cache" / name) for name in ("journal.jsonl", "journal-1.jsonl")]
    assert [sorted(journal) for journal in journals] == [
        ["00000.npy", "00002.npy", "00004.npy"],
        ["00001.npy", "00003.npy"],
    ]
    assert list(json.loads((two / "cache/manifest.json").read_text())) == [
        f"{n:05d}.npy" for n in range(SHARDS)
    ]
    frames = np.arange(sum(LENGTHS))
    for row, expected in zip(fill(world, two / "cache").read(frames), alone.read(frames), strict=True):
        np.testing.assert_allclose(row, expected, rtol=2e-3, atol=2e-3)
    assert reports(two, "frames") == [str(len(frames))] * 2


def test_all_processes_use_the_projection_of_the_first(two: Path) -> None:
    spec = json.loads((two / "compact/arm/spec.json").read_text())
    codec = TokenCodec.load(two / "compact" / FILE)[0]
    assert reports(two, "compact") == reports(two, "compact again") == [codec.sha256] * 2
    assert spec["projection"] == codec.sha256
    journals = [read_journal(two / "compact/arm" / name) for name in ("journal.jsonl", "journal-1.jsonl")]
    assert [len(journal) for journal in journals] == [3, 2]
    for text in reports(two, "compact alone"):
        assert "process 1 of 2: " in text and "is not the file that process 0 uses" in text
    for text in reports(two, "other dims"):
        assert "process 0 of 2: " in text and "was made for another dims (16)" in text


def test_another_number_of_processes_continues(world: Path, two: Path) -> None:
    folder = two / "cache"
    lost = folder / "00003.npy"
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    (folder / "manifest.json").unlink()
    journal = folder / "journal-1.jsonl"
    journal.write_text(
        "".join(f"{line}\n" for line in journal.read_text().splitlines() if lost.name not in line)
    )
    fill(world, folder)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    assert {name for name in after if after[name] != before[name]} == {lost.name}


def test_processes_that_see_different_files_are_refused_by_name(two: Path) -> None:
    for text in reports(two, "folder"):
        assert "process 1 of 2: " in text and "does not hold the files that process 0 wrote" in text
    for text in reports(two, "dataset"):
        assert "process 1 of 2 has another dataset than process 0; all processes must see the same" in text
    for text in reports(two, "corpus"):
        assert "process 1 of 2 has another corpus talk than process 0" in text
    for text in reports(two, "fault"):
        assert text == "process 1 of 2: the disk of 1 is full"
    for text in reports(two, "altered"):
        assert "00001.npy is missing or altered" in text


def test_waiting_ends_when_nobody_makes_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLM_PROCESS_TIMEOUT", "0.2")
    monkeypatch.setattr(cache_processes, "POLL_SECONDS", 0.01)
    with pytest.raises(
        BlmError, match=r"no process has finished a shard for 0.2 s; see the output of the other"
    ):
        wait_for_shards([WorkUnit("00000.npy", None)], tmp_path)


def test_a_line_that_another_process_is_writing_stays(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    text = '{"key": "a", "result": {}}\n{"key": "b", "res'
    journal.write_text(text)
    assert read_journal(journal, repair=False) == {"a": {}} and journal.read_text() == text
    assert read_journal(journal) == {"a": {}} and journal.read_text() == text.splitlines()[0] + "\n"


def test_a_large_shard_is_checked_by_size_and_samples(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SAMPLE_BLOCKS", 4)
    monkeypatch.setattr(files, "SAMPLE_BYTES", 64)
    fill(world, tmp_path)
    shard = tmp_path / "00001.npy"
    data = shard.read_bytes()
    hashed = list[Path]()
    monkeypatch.setattr(files, "sha256_file", hashed.append)
    fill(world, tmp_path)
    assert not hashed, "a whole shard was read"
    for changed in (data[:-1] + bytes([data[-1] ^ 1]), bytes([data[0] ^ 1]) + data[1:], data + b"0"):
        shard.write_bytes(changed)
        with pytest.raises(BlmError, match=r"00001\.npy is missing or altered"):
            fill(world, tmp_path)


def test_a_cache_of_an_older_version_is_hashed_whole(world: Path, tmp_path: Path) -> None:
    fill(world, tmp_path)
    manifest = tmp_path / "manifest.json"
    shards = json.loads(manifest.read_text())
    old = {
        name: {key: shard[key] for key in ("frames", "lengths", "sha256")} for name, shard in shards.items()
    }
    manifest.write_text(json.dumps(old))
    fill(world, tmp_path)
    data = bytearray((tmp_path / "00002.npy").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "00002.npy").write_bytes(data)
    with pytest.raises(BlmError, match=r"00002\.npy is missing or altered"):
        fill(world, tmp_path)


class StopError(Exception):
    """Ends a run before its work."""


def test_on_a_gpu_no_worker_loads_another_backbone(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[dict[str, Any]]()
    monkeypatch.setattr(cache_workers, "run_units", lambda *_, **options: calls.append(options))
    hashed, dataset = load(world), open_dataset(world / "arm")
    config = replace(CONFIG, workers=2)
    for device in ("cpu", "meta"):
        hashed.backbone.model.to(device)
        workers = FrameWorkers(hashed, dataset, config, lambda *_: lambda payload: {})
        workers([], tmp_path / "journal.jsonl", "")
    on_cpu, elsewhere = calls
    assert (on_cpu["workers"], elsewhere["workers"]) == (2, 0)
    assert "setup" in on_cpu and "setup" not in elsewhere


@pytest.mark.parametrize("fill_frames", [cache_hidden_states, cache_prompts])
def test_workers_compute_with_the_settings_of_this_process(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fill_frames: Callable[..., Any]
) -> None:
    def run_units(work: Callable[..., Any], units: list[WorkUnit], **options: Any) -> None:
        options["setup"](*options["setup_args"])
        raise StopError

    monkeypatch.setattr(cache_workers, "run_units", run_units)
    monkeypatch.setattr(cache_workers, "_writer", [])
    hashed = load(world, dtype=torch.bfloat16, attn_implementation="eager")
    dataset = open_dataset(world / "arm")
    with pytest.raises(StopError):
        fill_frames(hashed, dataset, replace(CONFIG, workers=1), tmp_path, ALONE)
    (write,) = cache_workers._writer
    owner: Any = write.__self__  # type: ignore[attr-defined]
    loaded = owner.live.backbone if hasattr(owner, "live") else owner.backbone
    assert loaded.model.dtype is torch.bfloat16
    assert loaded.attn_implementation == loaded.model.config._attn_implementation == "eager"


def attempt(action: Callable[[], object]) -> str:
    try:
        return str(action())
    except BlmError as error:
        return str(error)


def fill_other(world: Path, dataset: EpisodeDataset, folder: Path, processes: Processes) -> None:
    cache_hidden_states(load(world), dataset, CONFIG, folder, processes)


def work(world: Path, out: Path) -> None:
    processes = Processes.join("cpu")
    assert processes.count == 2
    rank = processes.rank
    cache_processes.SHARED_SECONDS = 1.0

    def fail() -> None:
        if rank == 1:
            raise BlmError("the disk of 1 is full")

    dataset = open_dataset(world / ("other/arm" if rank else "arm"))
    hashed = load(world)
    said = (Message("user", ("Hello.",)), Message("assistant", (f"I am process {rank}.",)))
    talk = TrainingSource(name="talk", conversations=[said])
    loop = LoopConfig(steps=1, batch_size=2)
    both = [open_dataset(world / name) for name in ("arm", "other/arm")]
    compact = replace(CONFIG, precision="compact", dims=16)

    def fill_compact(folder: Path, intents: HiddenStateConfig, count: int = 2) -> str:
        codec = open_projection(hashed, both[:count], intents, folder, processes)
        cache_hidden_states(hashed, both[0], intents, folder / "arm", processes, codec)
        return codec.sha256 if codec is not None else ""

    found = {
        "compact": attempt(lambda: fill_compact(out / "compact", compact)),
        "compact again": attempt(lambda: fill_compact(out / "compact", compact, 1)),
        "compact alone": attempt(lambda: fill_compact(out / f"own-compact-{rank}", compact)),
        "other dims": attempt(lambda: fill_compact(out / "compact", replace(compact, dims=24))),
        "fault": attempt(lambda: run_together(processes, fail)),
        "folder": attempt(lambda: fill(world, out / f"own-{rank}", processes)),
        "dataset": attempt(lambda: fill_other(world, dataset, out / "mixed", processes)),
        "corpus": attempt(
            lambda: train_stage1(hashed.backbone, [talk], Stage1Config(loop=loop), out / "stage1")
        ),
        "frames": attempt(lambda: len(fill(world, out / "cache", processes)._frames)),
    }
    fill(world, out / "altered", processes)
    processes.wait()
    if rank == 0:
        (out / "altered/00001.npy").write_bytes(b"other")
    processes.wait()
    found["altered"] = attempt(lambda: fill(world, out / "altered", processes))
    (out / f"report-{rank}.json").write_text(json.dumps(found))
    processes.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]), Path(sys.argv[2]))
