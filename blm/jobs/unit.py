"""What the engines share: a unit of work, what every worker must know, and what becomes of a unit."""

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
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
ONE_THREAD = dict.fromkeys(_THREAD_VARIABLES, "1")
"""For workers: two busy two-thread processes on two cores stall both."""
_MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


@dataclass(frozen=True)
class Unit:
    """One idempotent piece of work."""

    key: str
    payload: Any


@dataclass(frozen=True)
class Lost:
    """A unit that was given up."""

    reason: str


@dataclass(frozen=True)
class Job:
    """What every worker must know."""

    work: Callable[[Any], Result]
    setup: Callable[..., None] | None
    setup_args: tuple[Any, ...]
    workers: int
    folder: Path
    """Absolute folder of the journal, and beside it, of what the units write."""
    attempts: int
    """Workers that one unit may cost their lives."""

    def begin(self) -> None:
        if self.setup is not None:
            self.setup(*self.setup_args)


Runs = Generator[tuple[str, Result | Lost], None, None]
"""Key, and result or failure, of units in the order in which they end."""


def named(what: str, error: Exception) -> Exception:
    """The error of one unit with its key; what a user can mend is a BlmError."""
    mendable = isinstance(error, BlmError) or (isinstance(error, OSError) and error.errno in _MENDABLE)
    return (BlmError if mendable else RuntimeError)(f"{what} failed: {error}")


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables for the processes that start meanwhile: they inherit them."""
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
