"""One seam for long work: run keyed units over worker processes or a Ray cluster, resumably.

A unit is a key and a picklable payload. Results are small JSON-able dicts appended to a journal, one line
per finished unit, so a killed run continues where it stopped. Heavy products (episodes, feature shards) are
written by the unit itself, atomically, before it returns; a unit that runs twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

from blm.jobs.journal import appending, read_journal
from blm.jobs.local import run_inline, run_locally
from blm.jobs.ray import run_on_ray
from blm.jobs.unit import Job, Lost, Result, Runs, Unit
from blm.types import BlmError, lookup

__all__ = ["ENGINES", "MAX_WORKERS", "Result", "Unit", "read_journal", "run_units"]

ATTEMPTS = 3
"""How often a unit may cost a worker its life before it is given up."""
MAX_WORKERS = 1024


def run_units(
    work: Callable[[Any], Result],
    units: Sequence[Unit],
    *,
    journal: Path,
    workers: int = 2,
    title: str = "working",
    setup: Callable[..., None] | None = None,
    setup_args: tuple[Any, ...] = (),
    engine: str = "local",
) -> dict[str, Result]:
    """Run `work(payload)` for every unit that the journal lacks; return key -> result for all of them.

    `work` and `setup` are module-level functions; `setup` runs once in each worker. With `workers=0`
    everything runs in this process. A worker that dies (out of memory, kill -9, a lost node) is replaced and
    its unit runs again; one that has cost ATTEMPTS workers their lives is given up, the others go on, and the
    run ends with an error that names it. An exception raised by `work` stops the run with the unit's key.
    What had finished is in the journal, which only this process writes, a line in full or not at all.

    Engine "local" spawns processes. "ray" uses the Ray cluster that RAY_ADDRESS names, or else the one that
    `ray start` made on this machine, or else starts one here for the time of the run; every worker takes one
    CPU of it. All nodes need this package, and must share the folder of the journal and every folder that
    units write to.

    Raises BlmError for duplicate keys, a number of workers out of range, units that were given up, and a
    journal that another run is using or that cannot be written; UnknownNameError for another engine.
    """
    run = lookup("engine", engine, ENGINES)
    if len({unit.key for unit in units}) != len(units):
        raise BlmError("work units have duplicate keys; a key must name one piece of work")
    if not 0 <= workers <= MAX_WORKERS:
        raise BlmError(f"workers is {workers}; it must be 0 (all in this process) to {MAX_WORKERS:,}")
    lost: dict[str, str] = {}
    with appending(journal) as append:
        finished = read_journal(journal)
        todo = [unit for unit in units if unit.key not in finished]
        job = Job(work, setup, setup_args, workers, journal.parent.resolve(), ATTEMPTS)
        with (
            _progress(title, total=len(units), done=len(units) - len(todo)) as advance,
            closing(
                (run if workers else run_inline)(job, todo)
            ) as results,  # ends the workers, whatever happens
        ):
            for key, result in results:
                append(key, result)
                if isinstance(result, Lost):
                    lost[key] = result.reason
                else:
                    finished[key] = result
                advance()
    if lost:
        some = ", ".join(f"'{key}' {reason}" for key, reason in [*lost.items()][:3])
        raise BlmError(
            f"{len(lost)} of {len(units)} work units were given up, the others are finished: {some}. "
            "Check memory, or use fewer workers; the same command tries them again"
        )
    return {unit.key: finished[unit.key] for unit in units}


@contextmanager
def _progress(title: str, *, total: int, done: int) -> Iterator[Callable[[], None]]:
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda: bar.advance(task)


ENGINES: dict[str, Callable[[Job, Sequence[Unit]], Runs]] = {"local": run_locally, "ray": run_on_ray}
