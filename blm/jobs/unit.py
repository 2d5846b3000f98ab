"""Types that the engines share: a work unit, a job that workers run, and the result of a unit."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blm.types import BlmError

Result = dict[str, Any]
"""The result of a work unit: a JSON object, which the journal stores as a line."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
ONE_THREAD = dict.fromkeys(_THREAD_VARIABLES, "1")
"""Environment of worker processes: without it, workers with many threads slow each other down."""
_USER_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


@dataclass(frozen=True)
class WorkUnit:
    """An idempotent piece of work: running it twice has the effect of running it once."""

    key: str
    payload: Any


@dataclass(frozen=True)
class FailedUnit:
    """A work unit that was given up after too many attempts."""

    reason: str


@dataclass(frozen=True)
class JobSpec:
    """The work function and its settings, which every worker process receives."""

    work: Callable[[Any], Result]
    setup: Callable[..., None] | None
    setup_args: tuple[Any, ...]
    workers: int
    folder: Path
    """Absolute path of the folder of the journal and of the files that units write."""
    attempts: int
    """Maximum number of worker deaths per unit."""

    def set_up(self) -> None:
        """Run the set-up function once in a worker process."""
        if self.setup is not None:
            self.setup(*self.setup_args)


UnitResults = Generator[tuple[str, Result | FailedUnit], None, None]
"""Yields the key and the result or failure of each unit, in order of completion."""


def describe_failure(what: str, error: Exception) -> Exception:
    """Return an error that names the failed step; a BlmError if a user can fix the cause."""
    by_user = isinstance(error, BlmError) or (isinstance(error, OSError) and error.errno in _USER_ERRORS)
    return (BlmError if by_user else RuntimeError)(f"{what} failed: {error}")


@contextmanager
def environment_variables(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables within the context; processes that start there inherit them."""
    saved = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
