"""Fill a cache of shards, or the missing part of it, by all processes together, and check it.

    cache/  spec.json  journal.jsonl  00000.npy 00001.npy ..  manifest.json

A shard is a file that one work unit writes. spec.json records all that the values depend on: a
folder with another spec is refused. Each process computes a part of the shards and has a journal,
from which a killed run continues. The manifest is written last, and describes each shard: one that
is missing or altered is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from blm.io import read_json, write_json
from blm.jobs import WorkUnit
from blm.training.caches.files import ShardFile, require_unaltered
from blm.training.caches.processes import (
    journal_path,
    own_units,
    require_shared,
    wait_for_manifest,
    wait_for_shards,
)
from blm.training.loop.distributed import Processes
from blm.training.run_inputs import require_same_facts, require_same_inputs, run_together

Shard = TypeVar("Shard", bound=ShardFile)
Compute = Callable[[Sequence[WorkUnit], Path, str], object]
"""Computes shards: called with their work units, the journal, and the title of a progress bar. The
result of a unit has the fields of its shard (`describe_file`, for a plain `ShardFile`)."""


@dataclass(frozen=True, kw_only=True)
class Cache(Generic[Shard]):
    """A folder of shards, and what they are made from."""

    name: str
    """What errors call it, such as "hidden-state cache"."""
    folder: Path
    spec: Mapping[str, Any]
    """All that the values depend on."""
    shard: type[Shard]
    """Kind of the entries in the manifest."""
    title: str
    """What the progress bar calls its values, such as "hidden states of panda"."""


def fill_cache(
    cache: Cache[Shard],
    units: Sequence[WorkUnit],
    processes: Processes,
    compute: Compute,
    announce: Callable[[], None] = lambda: None,
) -> dict[str, Shard]:
    """Compute the shards that the folder lacks; return all, checked, by name in the order of
    `units`, whose keys are the names of the files.

    All of `processes` call this with the same units, and each computes a part. If shards may be
    missing, process 0 first calls `announce`, which may raise BlmError. Raises BlmError, in every
    process, if the folder holds a cache with another spec, or one that was altered, or if the
    processes see different files.
    """
    folder, label = cache.folder, f"{cache.name} '{cache.folder}'"
    manifest = folder / "manifest.json"

    def prepare() -> None:
        if processes.first:
            require_same_inputs(folder / "spec.json", cache.spec, f"{label} is stale")
            if not manifest.exists():
                announce()

    require_same_facts(processes, label, cache.spec)
    run_together(processes, prepare)
    require_shared(processes, folder)
    if not manifest.exists():
        if mine := own_units(units, folder, processes):
            part = f", process {processes.rank} of {processes.count}" if processes.count > 1 else ""
            compute(mine, journal_path(folder, processes.rank), cache.title + part)
        if processes.first:
            write_json(manifest, wait_for_shards(units, folder))
        else:
            wait_for_manifest(folder)
    shards = {name: cache.shard(**fields) for name, fields in read_json(manifest).items()}
    run_together(processes, lambda: require_unaltered(cache.name, folder, shards))
    return shards
