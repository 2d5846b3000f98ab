"""One seam for long work: run keyed units over worker processes, resumably.

A unit is a key and a picklable payload. Results are small JSON-able dicts appended to a journal, one line
per finished unit, so a killed run continues where it stopped. Heavy products (episodes, feature shards) are
written by the unit itself, atomically, before it returns; a unit that runs twice changes nothing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
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

from blm.types import BlmError

Result = dict[str, Any]
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS")


@dataclass(frozen=True)
class Unit:
    """One idempotent piece of work."""

    key: str
    payload: Any


def run_units(
    work: Callable[[Any], Result],
    units: Sequence[Unit],
    *,
    journal: Path,
    workers: int = 2,
    title: str = "working",
    attempts: int = 3,
    setup: Callable[..., None] | None = None,
    setup_args: tuple[Any, ...] = (),
) -> dict[str, Result]:
    """Run `work(payload)` for every unit that the journal lacks; return key -> result for all of them.

    `work` and `setup` are module-level functions (workers are spawned); `setup` runs once in each worker.
    With `workers=0` everything runs in this process. A worker that dies (out of memory, kill -9) costs its
    unit one of `attempts`; an exception raised by `work` stops the run with the unit's key, and what had
    finished stays in the journal. Raises BlmError for duplicate keys or a unit that keeps killing workers.
    """
    if len({unit.key for unit in units}) != len(units):
        raise BlmError("work units have duplicate keys; a key must name one piece of work")
    finished = read_journal(journal)
    todo = [unit for unit in units if unit.key not in finished]
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a") as log, _progress(title, total=len(units), done=len(units) - len(todo)) as advance:
        runs = (
            _inline(work, todo, setup, setup_args)
            if workers == 0
            else _pool(work, todo, workers, attempts, setup, setup_args)
        )
        for key, result in runs:
            finished[key] = result
            log.write(json.dumps({"key": key, "result": result}) + "\n")
            log.flush()
            advance()
    return {unit.key: finished[unit.key] for unit in units}


def read_journal(journal: Path) -> dict[str, Result]:
    """Return the finished units of a journal; a last line cut short by a kill is removed from the file."""
    if not journal.exists():
        return {}
    data = journal.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        temporary = journal.with_name(journal.name + ".tmp")
        temporary.write_bytes(whole)
        temporary.replace(journal)
    rows = [json.loads(line) for line in whole.decode().splitlines()]
    return {row["key"]: row["result"] for row in rows}


def _inline(
    work: Callable[[Any], Result],
    units: Sequence[Unit],
    setup: Callable[..., None] | None,
    setup_args: tuple[Any, ...],
) -> Iterator[tuple[str, Result]]:
    if setup is not None:
        setup(*setup_args)
    for unit in units:
        try:
            result = work(unit.payload)
        except Exception as error:
            raise _named(unit, error) from error
        yield unit.key, result


def _named(unit: Unit, error: Exception) -> Exception:
    """The error of one unit with its key; what a user can mend stays a BlmError."""
    kind = BlmError if isinstance(error, BlmError) else RuntimeError
    return kind(f"work unit '{unit.key}' failed: {error}")


def _pool(
    work: Callable[[Any], Result],
    units: Sequence[Unit],
    workers: int,
    attempts: int,
    setup: Callable[..., None] | None,
    setup_args: tuple[Any, ...],
) -> Iterator[tuple[str, Result]]:
    todo = list(units)
    deaths = 0
    while todo:
        pending = {unit.key: unit for unit in todo}
        try:
            with (
                _one_thread_per_worker(),
                ProcessPoolExecutor(
                    min(workers, len(todo)), multiprocessing.get_context("spawn"), setup, setup_args
                ) as pool,
            ):
                futures: dict[Future[Result], Unit] = {pool.submit(work, unit.payload): unit for unit in todo}
                try:
                    for future in as_completed(futures):
                        unit = futures[future]
                        try:
                            result = future.result()
                        except BrokenProcessPool:
                            raise
                        except Exception as error:
                            raise _named(unit, error) from error
                        del pending[unit.key]
                        yield unit.key, result
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        except BrokenProcessPool as error:
            deaths = deaths + 1 if len(pending) == len(todo) else 1
            if deaths >= attempts:
                raise BlmError(
                    f"worker processes died {deaths} times in a row with none of {len(pending)} units "
                    f"finished (first: '{next(iter(pending))}'); check memory, or run with workers=0"
                ) from error
        todo = list(pending.values())


@contextmanager
def _one_thread_per_worker() -> Iterator[None]:
    """Spawned workers inherit one-thread settings: two busy two-thread processes on two cores stall both."""
    saved = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _progress(title: str, *, total: int, done: int) -> Iterator[Callable[[], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda: bar.advance(task)
