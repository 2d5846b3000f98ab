"""Tables in the paper's shape: what was measured, beside what was published and not measured.

Measured cells carry n and a 95 % interval. So do published ones where n is known and answers are right or
wrong, which shows how little a hundred questions can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blm.evaluation.digital.benchmarks import published
from blm.evaluation.statistics import wilson
from blm.types import BlmError

Result = Mapping[str, Any]
NOTE = "published, not measured"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One score in percent."""

    value: float
    low: float | None = None
    """95 % interval; None where it cannot be known."""
    high: float | None = None
    n: int | None = None

    def text(self) -> str:
        """For people: "47.0 (37-57)"."""
        return (
            f"{self.value:.1f}" if self.low is None else f"{self.value:.1f} ({self.low:.0f}–{self.high:.0f})"
        )


@dataclass(frozen=True, kw_only=True)
class Line:
    """One model."""

    model: str
    published: bool
    cells: tuple[Cell | None, ...]
    """By column, the average last; None for what was not run."""


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A table of the paper with our lines in it."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]


def paper_tables(results: Sequence[tuple[str, Result]]) -> list[PaperTable]:
    """The tables that these results (label, result) have a place in: the six benchmarks, the kinds of two.

    Raises BlmError for two results of one benchmark under one label.
    """
    by_model: dict[str, dict[str, Result]] = {}
    for label, result in results:
        name = result["protocol"]["benchmark"]
        if name in by_model.setdefault(label, {}):
            raise BlmError(f"two results of '{name}' for '{label}'; label them apart: LABEL=FOLDER")
        by_model[label][name] = result
    six = {
        label: [_cell(of[name]["headline"]) if name in of else None for name in published.SIX]
        for label, of in by_model.items()
        if {*of} & {*published.SIX}
    }
    tables = [_table("Digital space", published.SIX, six, published.DIGITAL, (110, 100, 100, 100))]
    for name, title, kinds, known in (
        ("egothink", "EgoThink", published.EGOTHINK_KINDS, published.EGOTHINK),
        ("sharerobot", "ShareRobot", published.SHAREROBOT_KINDS, published.SHAREROBOT),
    ):
        parts = {label: of[name]["kinds"] for label, of in by_model.items() if name in of}
        ours = {
            label: [_cell(part[kind]) if kind in part else None for kind in kinds]
            for label, part in parts.items()
        }
        tables.append(_table(title, kinds, ours, known, ()))
    return [table for table in tables if any(not line.published for line in table.lines)]


def _table(
    title: str,
    columns: Sequence[str],
    ours: Mapping[str, Sequence[Cell | None]],
    known: Mapping[str, Sequence[float]],
    sizes: Sequence[int],
) -> PaperTable:
    lines = [
        Line(model=label, published=False, cells=(*cells, _average(cells))) for label, cells in ours.items()
    ]
    for label, values in known.items():
        cells = [_known(value, sizes[i] if i < len(sizes) else None) for i, value in enumerate(values)]
        mean = Cell(value=sum(values) / len(values))
        lines.append(Line(model=label, published=True, cells=(*cells, mean)))
    return PaperTable(title=title, columns=(*columns, "average"), lines=tuple(lines))


def _cell(part: Mapping[str, Any]) -> Cell:
    return Cell(value=100 * part["rate"], low=100 * part["low"], high=100 * part["high"], n=part["n"])


def _known(value: float, n: int | None) -> Cell:
    if n is None:
        return Cell(value=value)
    low, high = wilson(value / 100, n)
    return Cell(value=value, low=100 * low, high=100 * high, n=n)


def _average(cells: Sequence[Cell | None]) -> Cell | None:
    """Plain mean of all columns; its interval combines theirs (independent). None if one is missing."""
    full = [cell for cell in cells if cell is not None and cell.low is not None and cell.high is not None]
    if len(full) < len(cells):
        return None
    value = sum(cell.value for cell in full) / len(full)
    down = math.hypot(*(cell.value - (cell.low or 0.0) for cell in full)) / len(full)
    up = math.hypot(*((cell.high or 0.0) - cell.value for cell in full)) / len(full)
    return Cell(value=value, low=value - down, high=value + up, n=sum(cell.n or 0 for cell in full))


def to_markdown(table: PaperTable) -> str:
    """The table for a README; published lines are marked."""
    names = [column.replace("_", " ") for column in table.columns]
    rows = [["model", *names], ["---", *("---:" for _ in names)]]
    for line in table.lines:
        mark = f" *({NOTE})*" if line.published else ""
        rows.append([f"{line.model}{mark}", *(cell.text() if cell else "–" for cell in line.cells)])
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"### {table.title}\n\n{body}\n"
