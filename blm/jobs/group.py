"""Processes that do one piece of work together, as the parts that know no torch see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from blm.jobs import Result, WorkUnit, run_units

T = TypeVar("T")


class Group(Protocol):
    """Processes that call the same functions with the same arguments, seen from one of them."""

    @property
    def first(self) -> bool:
        """Whether this process writes what all of them make."""

    def together(self, action: Callable[[], T]) -> T:
        """Return `action()` of this process when all have run it. Raises BlmError in every process
        if it failed in one."""

    def run_units(
        self, work: Callable[[Any], Result], units: Sequence[WorkUnit], folder: Path, title: str
    ) -> dict[str, Result]:
        """Return key -> result of all units, of which each process runs a part in this process, with
        a journal of its own in `folder`."""


class Alone:
    """A group of one process."""

    first = True

    def together(self, action: Callable[[], T]) -> T:
        return action()

    def run_units(
        self, work: Callable[[Any], Result], units: Sequence[WorkUnit], folder: Path, title: str
    ) -> dict[str, Result]:
        return run_units(work, units, journal=folder / "journal.jsonl", workers=0, title=title)
