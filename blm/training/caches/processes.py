"""Share the filling of a cache among the processes that train together.

Each process computes shards of its own and has a journal of its own; process 0 writes the manifest.
Filling takes hours, longer than a collective operation may wait, so the processes wait for each
other by reading the journals, and give up only if no journal grows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import uuid4

from blm.io import read_json, sha256_file, write_json
from blm.jobs import Result, WorkUnit, read_journal, run_units
from blm.training.loop.distributed import DataShard, Processes, process_timeout
from blm.training.run_inputs import run_together
from blm.types import BlmError

T = TypeVar("T")
POLL_SECONDS = 0.5
"""Time between two looks at the files of other processes [s]."""
SHARED_SECONDS = 60.0
"""Time in which a file that one process wrote must be visible to all [s]; network file systems
delay it."""
STALLED_SECONDS = 1800.0
"""Time without a finished shard after which filling has failed [s], unless BLM_PROCESS_TIMEOUT is
set."""


def require_shared(processes: Processes, folder: Path) -> None:
    """Raise BlmError in every process unless all of them see in `folder` what process 0 wrote."""

    def view() -> tuple[Any, bool]:
        spec = folder / "spec.json"
        return (read_json(spec) if spec.exists() else None, (folder / "manifest.json").exists())

    expected = processes.gather_objects(view())[0]

    def look() -> None:
        end = time.monotonic() + SHARED_SECONDS
        while view() != expected:
            if time.monotonic() > end:
                raise BlmError(
                    f"'{folder}' does not hold the files that process 0 wrote there; name a folder that all "
                    "processes share"
                )
            time.sleep(POLL_SECONDS)

    run_together(processes, look)


def wait_for_file(path: Path, sha256: str) -> None:
    """Wait until `path` is the file that process 0 wrote. Raises BlmError after SHARED_SECONDS."""
    end = time.monotonic() + SHARED_SECONDS
    while not path.exists() or sha256_file(path) != sha256:
        if time.monotonic() > end:
            raise BlmError(
                f"'{path}' is not the file that process 0 uses; name a folder that all processes share"
            )
        time.sleep(POLL_SECONDS)


def by_first(processes: Processes, folder: Path, action: Callable[[], T]) -> T:
    """Return what `action` returns in process 0, a JSON value; the other processes wait for it.

    It may take hours, longer than a collective operation may wait, so they wait for a file in
    `folder`. Raises BlmError in every process if the action fails, or if they do not share the folder;
    any other error, or an interrupt, is raised in process 0 and ends the others with a BlmError.
    """
    if processes.count == 1:
        return action()
    path = folder / f"awaited-{processes.gather_objects(uuid4().hex)[0]}.json"
    if processes.first:
        write_json(path, {"running": True})
        try:
            write_json(path, {"value": action()})
        except BlmError as error:
            write_json(path, {"error": str(error)})
        except BaseException as error:  # process 0 ends here, so the others must not wait for it
            write_json(path, {"died": f"process 0 failed: {error!r}"})
            raise
    end = time.monotonic() + SHARED_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            raise BlmError(f"'{path}' of process 0 is not there: name a folder that all processes share")
        time.sleep(POLL_SECONDS)
    while "running" in (found := read_json(path)):
        time.sleep(POLL_SECONDS)
    if "died" in found:
        raise BlmError(found["died"])
    processes.wait()
    if processes.first:
        path.unlink()
    if "error" in found:
        raise BlmError(found["error"])
    return cast(T, found["value"])


def journal_path(folder: Path, rank: int) -> Path:
    """Return the journal of one process."""
    return folder / ("journal.jsonl" if rank == 0 else f"journal-{rank}.jsonl")


def finished_shards(folder: Path, *, repair: bool = False) -> dict[str, Result]:
    """Return the finished shards in the journals of all processes, present and former; see
    `read_journal` for `repair`."""
    finished: dict[str, Result] = {}
    for journal in sorted(folder.glob("journal*.jsonl")):
        finished |= read_journal(journal, repair=repair)
    return finished


def own_units(units: Sequence[WorkUnit], folder: Path, processes: Processes) -> list[WorkUnit]:
    """Return the unfinished units of this process; every process must call this before any begins
    one."""
    finished = finished_shards(folder, repair=processes.first)
    processes.wait()
    mine = DataShard(processes.rank, processes.count).of(units)
    return [unit for unit in mine if unit.key not in finished]


def wait_for_shards(units: Sequence[WorkUnit], folder: Path) -> dict[str, Result]:
    """Wait until all units are finished; return the results of all processes, in the order of
    `units`.

    Raises BlmError when no process finishes a shard for STALLED_SECONDS or BLM_PROCESS_TIMEOUT.
    """
    finished = finished_shards(folder)

    def complete() -> bool:
        finished.update(finished_shards(folder))
        return all(unit.key in finished for unit in units)

    _wait(complete, folder)
    return {unit.key: finished[unit.key] for unit in units}


def wait_for_manifest(folder: Path) -> None:
    """Wait until process 0 has written the manifest; raises as `wait_for_shards` does."""
    _wait((folder / "manifest.json").exists, folder)


def _wait(complete: Callable[[], bool], folder: Path) -> None:
    limit = process_timeout() or STALLED_SECONDS
    size = -1
    since = time.monotonic()
    while not complete():
        now = sum(journal.stat().st_size for journal in folder.glob("journal*.jsonl"))
        if now != size:
            size = now
            since = time.monotonic()
        elif time.monotonic() - since > limit:
            raise BlmError(
                f"cache '{folder}': no process has finished a shard for {limit:g} s; see the output "
                "of the other processes. The same command continues; BLM_PROCESS_TIMEOUT [s] sets this limit"
            )
        time.sleep(POLL_SECONDS)


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train together as a `Group`, for work whose parts take about equally long:
    they wait for each other in collective operations, which BLM_PROCESS_TIMEOUT limits."""

    processes: Processes

    @property
    def first(self) -> bool:
        return self.processes.first

    def together(self, action: Callable[[], T]) -> T:
        return run_together(self.processes, action)

    def run_units(
        self, work: Callable[[Any], Result], units: Sequence[WorkUnit], folder: Path, title: str
    ) -> dict[str, Result]:
        """Return the results of all units; those in a journal, also of a former process, stay."""
        processes = self.processes
        finished = self.together(lambda: finished_shards(folder, repair=self.first))
        part = DataShard(processes.rank, processes.count).of(units)
        mine = [unit for unit in part if unit.key not in finished]
        journal = journal_path(folder, processes.rank)
        shown = title if self.first else ""
        self.together(lambda: run_units(work, mine, journal=journal, workers=0, title=shown))
        return self.together(lambda: wait_for_shards(units, folder))
