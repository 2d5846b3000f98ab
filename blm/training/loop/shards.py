"""Checkpoints whose sharded tensors lie in several files, read under any number of processes.

FSDP2 shards a tensor by rows (along its first dimension) over the processes in order of rank. The
header of a checkpoint has the index {name: [b_0, .., b_n]}: process r wrote rows b_r .. b_r+1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from blm.types import BlmError

_PART = re.compile(r"(state-\d{8,})\.part-\d+(\.safetensors)")


def part_path(main: Path, rank: int) -> Path:
    """Return the file with the rows of a process other than the first, beside the main file."""
    return main.with_suffix(f".part-{rank}.safetensors")


def part_paths(out: Path) -> Iterator[tuple[Path, Path]]:
    """Yield each file of rows in a folder, and the main file that it belongs to."""
    for path in out.glob("state-*.part-*.safetensors"):
        if found := _PART.fullmatch(path.name):
            yield path, path.with_name("".join(found.groups()))


def row_bounds(tensor: DTensor) -> list[int]:
    """Return the index of a tensor that is sharded by rows: rows [b_r, b_r+1) are of process r.

    As `torch.chunk` does, all processes have equally many rows, except the last ones.
    """
    assert tensor.placements == (Shard(0),), tensor.placements
    rows, count = tensor.shape[0], tensor.device_mesh.size()
    bounds = [min(rank * -(-rows // count), rows) for rank in range(count + 1)]
    rank = tensor.device_mesh.get_local_rank()
    assert len(tensor.to_local()) == bounds[rank + 1] - bounds[rank]
    return bounds


class StoredTensors:
    """The tensors of a checkpoint; a context manager.

    Raises BlmError if a file with rows is missing.
    """

    def __init__(self, main: Path) -> None:
        self._files = ExitStack()
        self._main = self._files.enter_context(safe_open(main, "pt"))
        self.header: dict[str, Any] = json.loads((self._main.metadata() or {}).get("run", "{}"))
        self.names = set(self._main.keys())
        self._shards: dict[str, list[int]] = self.header.get("shards", {})
        count = max((len(bounds) - 1 for bounds in self._shards.values()), default=1)
        self._parts = [self._main, *(self._open(part_path(main, rank), main) for rank in range(1, count))]

    def _open(self, part: Path, main: Path) -> Any:
        if not part.exists():
            raise BlmError(
                f"'{part}' is missing: it has a part of the weights of '{main.name}'. Restore the file, or "
                f"remove '{main}' to resume from the checkpoint before"
            )
        return self._files.enter_context(safe_open(part, "pt"))

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def read(self, name: str) -> Tensor:
        """Return a whole tensor, on the CPU."""
        if name not in self._shards:
            return self._main.get_tensor(name)
        return torch.cat([part.get_tensor(name) for part in self._parts])

    @torch.no_grad()
    def copy_into(self, name: str, target: Tensor) -> None:
        """Copy a tensor; of a DTensor this process reads its own rows only."""
        if not isinstance(target, DTensor):
            target.copy_(self.read(name))
            return
        bounds, rank = row_bounds(target), target.device_mesh.get_local_rank()
        local, first = target.to_local(), bounds[rank]
        for begin, rows in self._rows(name, first, bounds[rank + 1]):
            local[begin - first : begin - first + len(rows)].copy_(rows)

    def _rows(self, name: str, first: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """Yield rows [first, end) as pieces, each with the number of its first row."""
        stored = self._shards.get(name, [0, end])
        for part, (begin, stop) in zip(self._parts, pairwise(stored), strict=False):
            low, high = max(begin, first), min(stop, end)
            if low < high:
                yield low, part.get_slice(name)[low - begin : high - begin]
