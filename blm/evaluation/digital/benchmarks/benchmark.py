"""A benchmark as data: its source, the form of its questions, and the average that is its score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from blm.types import BlmError, Question


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One question benchmark, as data."""

    name: str
    title: str
    """Name in papers."""
    get: str
    """Source of the data, and the expected layout of the folder; printed when it is missing."""
    licence: str
    load: Callable[[Path], list[Question]]
    """Read the folder; images stay relative references. Raises BlmError with file and rule."""
    system: str = ""
    """System message put before each question."""
    max_tokens: int = 32
    """Maximum length of an answer [tokens]."""
    long: Mapping[str, int] = field(default_factory=dict)
    """Kind of question -> its own limit of answer tokens."""
    average: Literal["items", "kinds"] = "items"
    """Headline score: the mean over questions, or the unweighted mean over the kinds."""

    def questions(self, folder: Path) -> list[Question]:
        """Load the questions. Raises BlmError, which tells where to get them, without the folder."""
        if not folder.is_dir():
            raise BlmError(f"no data of {self.title} at '{folder}'. {self.get}")
        return self.load(folder)
