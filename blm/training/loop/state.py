"""Checkpoints of the training loop, from which a run resumes to the same bits, in safetensors.

`out/state-<steps done>.safetensors` holds trained weights, buffers, optimizer moments, the EMA and
the states of the random-number generators; its header holds the config. With sharded weights (FSDP2)
each process writes its rows: process 0 to that file, process r to `state-<steps done>.part-<r>
.safetensors`, and the header of the first file names the rows of each. That file is written last,
when all parts are on disk, so a checkpoint without it does not exist. The number of processes, and
sharding, may change between runs.

Threads write the files while training goes on, from copies in host memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from blm.io import replacing, write_text
from blm.training.loop.distributed import Processes
from blm.training.loop.shards import StoredTensors, part_path, part_paths, row_bounds
from blm.types import BlmError

ADDED = {"precision": None, "epochs": 0.0}
"""Fields of LoopConfig that older checkpoints lack, and the values with which those runs computed."""
_NAME = re.compile(r"state-\d{8,}\.safetensors")


def checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(path for path in out.glob("state-*.safetensors") if _NAME.fullmatch(path.name))


class CheckpointWriter:
    """Writes the checkpoints of a run in a thread, one after another; a context manager.

    Every process calls the same methods. The first writes what all processes hold alike, and each
    writes its rows of sharded tensors. An error of a thread, such as a full disk, is raised in the
    next call.
    """

    def __init__(self, out: Path, processes: Processes, keep: int) -> None:
        """The last `keep` checkpoints are kept."""
        self.out, self.processes, self.keep = out, processes, keep
        self._pool = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}
        self._group: dist.ProcessGroup | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until everything is written, in all processes; after an error, only in this one."""
        try:
            if error is None:
                self._finish()
                self.processes.wait()
        finally:
            self._pool.shutdown()
            if self._group is not None:
                dist.destroy_process_group(self._group)

    def save(self, run: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Begin to write the checkpoint after `run["done"]` steps; `run` becomes the header.

        Waits until the previous one is written.
        """
        self._finish()
        sharded = {name: row_bounds(value) for name, value in tensors.items() if isinstance(value, DTensor)}
        if sharded and self._group is None:  # collective operations of the threads need their own
            self._group = dist.new_group(backend="gloo")
        random = _random_states(self.processes)
        mine = {
            name: value.to_local() if isinstance(value, DTensor) else value
            for name, value in tensors.items()
            if self.processes.first or name in sharded
        }
        if not mine:
            return
        copied = self._copy(mine)
        written = {**self._copies, **(random if self.processes.first else {})}
        header = {**run, "shards": sharded} if sharded else dict(run)
        self._pending = self._pool.submit(self._write, header, written, copied)

    def raise_error(self) -> None:
        """Raise the error of the thread, if it ended with one."""
        if self._pending is not None and self._pending.done():
            self._finish()

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> torch.cuda.Event | None:
        """Copy tensors into `_copies`; on CUDA, return the event after which the copies are there.

        The copies are allocated once: making pinned memory takes longer than to fill it.
        """
        on_cuda = self.processes.device.type == "cuda"
        for name, value in tensors.items():
            if name not in self._copies:
                made = torch.empty(value.shape, dtype=value.dtype)
                self._copies[name] = made.pin_memory() if on_cuda else made
        copies = [self._copies[name] for name in tensors]
        torch._foreach_copy_(copies, [value.detach() for value in tensors.values()], non_blocking=on_cuda)
        if not on_cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _write(
        self, header: Mapping[str, Any], tensors: dict[str, Tensor], copied: torch.cuda.Event | None
    ) -> None:
        """Write the file of this process, and remove old ones; runs in the thread."""
        if copied is not None:
            copied.synchronize()
        main = self.out / f"state-{header['done']:08d}.safetensors"
        metadata = {"run": json.dumps(header)}
        path = main if self.processes.first else part_path(main, self.processes.rank)
        if not self.processes.first:
            self._together(lambda: _save(path, tensors, metadata))
            return
        with replacing(main) as temporary:
            self._together(lambda: save_file(tensors, temporary, metadata))
        self._remove_old(main)

    def _together(self, write: Callable[[], object]) -> None:
        """Write in this process. Raises BlmError, in every process, if one could not."""
        if self._group is None:
            write()
            return
        fault = ""
        try:
            write()
        except Exception as error:  # any error must reach the processes that wait for this one
            fault = f"{type(error).__name__}: {error}"
        for rank, text in enumerate(self.processes.gather_objects(fault, self._group)):
            if text:
                raise BlmError(f"process {rank} of {self.processes.count} wrote no checkpoint: {text}")

    def _remove_old(self, newest: Path) -> None:
        """Remove all but the last checkpoints, and parts that a killed run left behind."""
        for old in checkpoints(self.out)[: -self.keep]:
            old.unlink()
        for part, main in part_paths(self.out):
            if main.name < newest.name and not main.exists():
                part.unlink()


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, dict(metadata))


def _random_states(processes: Processes) -> dict[str, Tensor]:
    states = {f"rng/cpu/{i}": state for i, state in enumerate(processes.gather(torch.get_rng_state()))}
    if processes.device.type == "cuda":
        cuda = processes.gather(torch.cuda.get_rng_state(processes.device))
        states |= {f"rng/cuda/{i}": state for i, state in enumerate(cuda)}
    return states


def restore_state(
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    processes: Processes,
    may_change: tuple[str, ...],
) -> tuple[int, float]:
    """Copy the newest checkpoint of `out` into `tensors`; return steps done and seconds spent.

    Both are 0 without a checkpoint. Restores the random states of this process's rank; a rank that
    the run did not have keeps its own. Raises BlmError for a run of another module, or of a config
    that differs in fields other than `may_change`.
    """
    found = checkpoints(out)
    if not found:
        return 0, 0.0
    with StoredTensors(found[-1]) as saved:
        header = saved.header
        if not {"done", "seconds", "config"} <= header.keys():
            raise BlmError(f"'{found[-1]}' is not a checkpoint of this program; use a new folder")
        mine = json.loads(json.dumps(config))
        later = {name: value for name, value in ADDED.items() if name in mine}
        there = {**later, **header["config"], **{name: mine[name] for name in may_change}}
        if there != mine:
            raise BlmError(f"{out} holds a run of another config; use a new folder.\n  {there}\n  {mine}")
        names = {name for name in saved.names if not name.startswith("rng/")}
        if names != tensors.keys():
            strange = sorted(names ^ tensors.keys())[:5]
            raise BlmError(f"{out} holds a run of another module: {strange} are in one of them only")
        for name, value in tensors.items():
            saved.copy_into(name, value)
        if (cpu := f"rng/cpu/{processes.rank}") in saved.names:
            torch.set_rng_state(saved.read(cpu))
        if (cuda := f"rng/cuda/{processes.rank}") in saved.names and processes.device.type == "cuda":
            torch.cuda.set_rng_state(saved.read(cuda), processes.device)
    return header["done"], header["seconds"]


def truncate_log(log: Path, done: int) -> None:
    """Remove the rows of a log after step `done`, and an incomplete last row.

    Raises BlmError, and leaves the file unchanged, if it is not the log of a training run.
    """
    text = log.read_text() if log.exists() else ""
    rows = text[: text.rfind("\n") + 1].splitlines()
    try:
        kept = [row for row in rows if json.loads(row)["step"] <= done]
    except (ValueError, KeyError, TypeError) as error:
        raise BlmError(f"'{log}' is not the log of a training ({error}); use a new folder") from error
    write_text(log, "".join(row + "\n" for row in kept))
