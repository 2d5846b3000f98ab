"""Checkpoints of the training loop: everything that a run needs to go on to the same bits, in safetensors.

`out/state-<steps done>.safetensors` holds trained weights, buffers, moments, the moving average and random
states; its header the config. Tensors are stored whole, so the number of processes may change between runs.
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
from blm.training.loop.distributed import Processes, fill, full
from blm.types import BlmError

_NAME = re.compile(r"state-\d{8,}\.safetensors")


def checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(path for path in out.glob("state-*.safetensors") if _NAME.fullmatch(path.name))


def save(
    out: Path, run: Mapping[str, Any], tensors: Mapping[str, Tensor], processes: Processes, keep: int
) -> None:
    """Write the checkpoint of `run["done"]` steps in one move, and remove all but the last `keep`.

    Every process must call this; the first one writes.
    """
    written, storages = {}, set[int]()
    for name, value in tensors.items():
        whole = full(value.detach())
        if processes.first:
            whole = whole.to("cpu").contiguous()
            where = whole.untyped_storage().data_ptr()
            # only what shares memory is copied: the format refuses it, and all of it may not fit twice
            written[name] = whole.clone() if where in storages else whole
            storages.add(where)
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


def restore(
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    processes: Processes,
    may_change: tuple[str, ...],
) -> tuple[int, float]:
    """Copy the newest checkpoint of `out`, if any, into `tensors`; return steps done and seconds spent.

    Raises BlmError for a run of another module, or of another config but for the fields in `may_change`.
    Random states are those of this process's rank; a rank that the run did not have keeps its own.
    """
    found = checkpoints(out)
    if not found:
        return 0, 0.0
    with safe_open(found[-1], "pt") as saved:
        header = json.loads((saved.metadata() or {}).get("run", "{}"))
        if not {"done", "seconds", "config"} <= header.keys():
            raise BlmError(f"'{found[-1]}' is no checkpoint of a training here; use a new folder")
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
                fill(value, saved.get_tensor(name))
        if (cpu := f"rng/cpu/{processes.rank}") in stored:
            torch.set_rng_state(saved.get_tensor(cpu))
        if (cuda := f"rng/cuda/{processes.rank}") in stored and processes.device.type == "cuda":
            torch.cuda.set_rng_state(saved.get_tensor(cuda), processes.device)
    return header["done"], header["seconds"]


def cut_log(log: Path, done: int) -> None:
    """Remove the rows of a log after step `done`, and a row that a kill left unfinished.

    Raises BlmError for a file with rows that no training wrote: nothing of it is touched.
    """
    text = log.read_text() if log.exists() else ""
    rows = text[: text.rfind("\n") + 1].splitlines()
    try:
        kept = [row for row in rows if json.loads(row)["step"] <= done]
    except (ValueError, KeyError, TypeError) as error:
        raise BlmError(f"'{log}' is not the log of a training ({error}); use a new folder") from error
    write_text(log, "".join(row + "\n" for row in kept))
