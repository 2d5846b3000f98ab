"""Checkpoints of the training loop, from which a run resumes to the same bits, in safetensors.

`out/state-<steps done>.safetensors` holds trained weights, buffers, optimizer moments, the EMA and
the states of the random-number generators; its header holds the config. Tensors are stored
unsharded, so the number of processes may change between runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from blm.io import replacing, write_text
from blm.training.loop.distributed import Processes, copy_full_tensor, full_tensor
from blm.types import BlmError

_NAME = re.compile(r"state-\d{8,}\.safetensors")


def checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(path for path in out.glob("state-*.safetensors") if _NAME.fullmatch(path.name))


def save_state(
    out: Path, run: Mapping[str, Any], tensors: Mapping[str, Tensor], processes: Processes, keep: int
) -> None:
    """Write the checkpoint after `run["done"]` steps atomically; keep the last `keep`.

    Every process must call this; the first one writes. `run` becomes the header.
    """
    written, storages = {}, set[int]()
    for name, value in tensors.items():
        tensor = full_tensor(value.detach())
        if processes.first:
            tensor = tensor.to("cpu").contiguous()
            storage = tensor.untyped_storage().data_ptr()
            # safetensors refuses shared memory; cloning everything might exceed memory
            written[name] = tensor.clone() if storage in storages else tensor
            storages.add(storage)
    written |= _random_states(processes)
    if processes.first:
        with replacing(out / f"state-{run['done']:08d}.safetensors") as temporary:
            save_file(written, temporary, metadata={"run": json.dumps(run)})
        for old in checkpoints(out)[:-keep]:
            old.unlink()
    processes.wait()


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
    with safe_open(found[-1], "pt") as saved:
        header = json.loads((saved.metadata() or {}).get("run", "{}"))
        if not {"done", "seconds", "config"} <= header.keys():
            raise BlmError(f"'{found[-1]}' is not a checkpoint of this program; use a new folder")
        mine = json.loads(json.dumps(config))
        there = {**header["config"], **{name: mine[name] for name in may_change}}
        if there != mine:
            raise BlmError(f"{out} holds a run of another config; use a new folder.\n  {there}\n  {mine}")
        stored = set(saved.keys())
        names = {name for name in stored if not name.startswith("rng/")}
        if names != tensors.keys():
            strange = sorted(names ^ tensors.keys())[:5]
            raise BlmError(f"{out} holds a run of another module: {strange} are in one of them only")
        with torch.no_grad():
            for name, value in tensors.items():
                copy_full_tensor(saved.get_tensor(name), value)
        if (cpu := f"rng/cpu/{processes.rank}") in stored:
            torch.set_rng_state(saved.get_tensor(cpu))
        if (cuda := f"rng/cuda/{processes.rank}") in stored and processes.device.type == "cuda":
            torch.cuda.set_rng_state(saved.get_tensor(cuda), processes.device)
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
