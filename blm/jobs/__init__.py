"""Resumable parallel work: run keyed work units on worker processes or on a Ray cluster.

A work unit is a key and a picklable payload. Its result is a small JSON-serialisable dict, which is
appended to a journal, one line per finished unit, so a killed run resumes where it stopped. A unit
writes large outputs (episodes, feature shards) itself, atomically, before it returns. Units must be
idempotent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from blm.jobs.journal import open_journal, read_journal
from blm.jobs.local import run_inline, run_locally
from blm.jobs.ray import run_on_ray
from blm.jobs.unit import FailedUnit, JobSpec, Result, UnitResults, WorkUnit
from blm.types import BlmError, lookup

__all__ = ["ENGINES", "MAX_WORKERS", "Result", "WorkUnit", "read_journal", "run_units"]

ATTEMPTS = 3
"""Maximum number of worker deaths per unit; then the unit is given up."""
MAX_WORKERS = 1024
"""Maximum number of workers."""


def run_units(
    work: Callable[[Any], Result],
    units: Sequence[WorkUnit],
    *,
    journal: Path,
    workers: int = 2,
    title: str = "working",
    setup: Callable[..., None] | None = None,
    setup_args: tuple[Any, ...] = (),
    engine: str = "local",
) -> dict[str, Result]:
    """Run `work(payload)` for every unit that is not in the journal.

    Return key -> result for all units.

    `work` and `setup` must be module-level functions; `setup` runs once in each worker. With
    `workers=0` everything runs in this process. Without a title there is no progress bar.

    If a worker dies (out of memory, kill -9, a lost node), it is replaced and its unit is retried.
    After ATTEMPTS deaths a unit is given up; the other units continue, and the run ends with an
    error that names it. An exception in `work` stops the run with an error that names the unit.
    Finished units are in the journal, which only this process writes.

    Engine "local" spawns processes. Engine "ray" uses the Ray cluster at RAY_ADDRESS, or else the
    one that `ray start` started on this machine, or else a cluster that it starts for this run.
    Every worker uses one CPU. All nodes need this package and must share the folders of the journal
    and of all files that units write.

    Raises BlmError for duplicate keys, an invalid number of workers, units that were given up, and
    a journal that another run uses or that cannot be written; UnknownNameError for an unknown
    engine.
    """
    engine_run = lookup("engine", engine, ENGINES)
    if not workers:
        engine_run = run_inline
    if len({unit.key for unit in units}) != len(units):
        raise BlmError("work units have duplicate keys; a key must name one piece of work")
    if not 0 <= workers <= MAX_WORKERS:
        raise BlmError(f"workers is {workers}; it must be 0 (all in this process) to {MAX_WORKERS:,}")
    given_up: dict[str, str] = {}
    with open_journal(journal) as append:
        finished = read_journal(journal)
        pending = [unit for unit in units if unit.key not in finished]
        job = JobSpec(work, setup, setup_args, workers, journal.parent.resolve(), ATTEMPTS)
        with (
            _progress(title, total=len(units), done=len(units) - len(pending)) as advance,
            closing(engine_run(job, pending)) as results,  # stops the workers in any case
        ):
            for key, result in results:
                append(key, result)
                if isinstance(result, FailedUnit):
                    given_up[key] = result.reason
                else:
                    finished[key] = result
                advance()
    if given_up:
        raise _given_up_error(given_up, len(units))
    return {unit.key: finished[unit.key] for unit in units}


def _given_up_error(reasons: Mapping[str, str], count: int) -> BlmError:
    """Return the error of a run in which units (key -> reason) were given up."""
    some = ", ".join(f"'{key}' {reason}" for key, reason in [*reasons.items()][:3])
    return BlmError(
        f"{len(reasons)} of {count} work units were given up, the others are finished: {some}. "
        "Check memory, or use fewer workers; the same command tries them again"
    )


@contextmanager
def _progress(title: str, *, total: int, done: int) -> Iterator[Callable[[], None]]:
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    with Progress(*columns, console=Console(stderr=True), disable=not title) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda: bar.advance(task)


ENGINES: dict[str, Callable[[JobSpec, Sequence[WorkUnit]], UnitResults]] = {
    "local": run_locally,
    "ray": run_on_ray,
}
