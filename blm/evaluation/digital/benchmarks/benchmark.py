"""What a benchmark is: where its data lie, how its questions are asked, and how its score is
summed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from blm.types import BlmError, Question


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark of the digital space, as data."""

    name: str
    title: str
    """As papers write it."""
    get: str
    """Where exactly to get the data, and how they have to lie in the folder; shown when they do
    not."""
    licence: str
    load: Callable[[Path], list[Question]]
    """Read the folder. Pictures stay references relative to it. Raises BlmError naming file and
    rule."""
    system: str = ""
    """System message put before each question."""
    max_tokens: int = 32
    """Longest answer."""
    long: Mapping[str, int] = field(default_factory=dict)
    """Kinds of questions that get another length."""
    average: Literal["items", "kinds"] = "items"
    """items: every question counts the same. kinds: the unweighted mean over the kinds."""

    def questions(self, folder: Path) -> list[Question]:
        """The questions of `folder`. Raises BlmError that says where to get them when it does not
        exist.
        """
        if not folder.is_dir():
            raise BlmError(f"no data of {self.title} at '{folder}'. {self.get}")
        return self.load(folder)
