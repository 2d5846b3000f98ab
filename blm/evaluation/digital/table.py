"""Tables in the paper's layout: our measured scores next to the published ones.

Measured scores have n and a 95 % interval. So do published ones if n is known and answers are right
or wrong; the intervals show that a hundred questions distinguish few models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blm.evaluation.digital.benchmarks import published
from blm.evaluation.digital.result import DigitalResult
from blm.evaluation.statistics import Rate, wilson
from blm.types import BlmError

NOTE = "published, not measured"


@dataclass(frozen=True, kw_only=True)
class TableScore:
    """One score in percent."""

    value: float
    low: float | None = None
    """Lower end of the 95 % interval; None if it is unknown."""
    high: float | None = None
    n: int | None = None

    def text(self) -> str:
        """Format the score as "47.0 (37–57)"."""
        return (
            f"{self.value:.1f}" if self.low is None else f"{self.value:.1f} ({self.low:.0f}–{self.high:.0f})"
        )


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """The scores of one model."""

    model: str
    published: bool
    scores: tuple[TableScore | None, ...]
    """Scores by column, the average last; None for a benchmark that was not run."""


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A table of the paper with our results as further rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]


def paper_tables(results: Sequence[tuple[str, DigitalResult]]) -> list[PaperTable]:
    """Return the tables that these results (label, result) belong in; without results, all tables
    with their published rows.

    Raises BlmError for two results of one benchmark under one label.
    """
    by_model: dict[str, dict[str, DigitalResult]] = {}
    for label, result in results:
        name = result.protocol.benchmark
        if name in by_model.setdefault(label, {}):
            raise BlmError(f"two results of '{name}' for '{label}'; give them different labels: LABEL=FOLDER")
        by_model[label][name] = result
    six = {
        label: [_measured(of[name].summary.headline) if name in of else None for name in published.SIX]
        for label, of in by_model.items()
        if {*of} & {*published.SIX}
    }
    tables = [
        _table("Digital space", published.SIX, six, published.DIGITAL, published.COUNTS[: published.EXACT])
    ]
    for name, title, kinds, known in (
        ("egothink", "EgoThink", published.EGOTHINK_KINDS, published.EGOTHINK),
        ("sharerobot", "ShareRobot", published.SHAREROBOT_KINDS, published.SHAREROBOT),
    ):
        parts = {label: of[name].summary.kinds for label, of in by_model.items() if name in of}
        ours = {
            label: [_measured(part[kind]) if kind in part else None for kind in kinds]
            for label, part in parts.items()
        }
        tables.append(_table(title, kinds, ours, known, ()))
    return [table for table in tables if not results or any(not row.published for row in table.rows)]


def _table(
    title: str,
    columns: Sequence[str],
    ours: Mapping[str, Sequence[TableScore | None]],
    known: Mapping[str, Sequence[float]],
    sizes: Sequence[int],
) -> PaperTable:
    rows = [
        TableRow(model=label, published=False, scores=(*scores, _average(scores)))
        for label, scores in ours.items()
    ]
    for label, values in known.items():
        scores = [_published(value, sizes[i] if i < len(sizes) else None) for i, value in enumerate(values)]
        mean = TableScore(value=sum(values) / len(values))
        rows.append(TableRow(model=label, published=True, scores=(*scores, mean)))
    return PaperTable(title=title, columns=(*columns, "average"), rows=tuple(rows))


def _measured(rate: Rate) -> TableScore:
    return TableScore(value=100 * rate.rate, low=100 * rate.low, high=100 * rate.high, n=rate.n)


def _published(value: float, n: int | None) -> TableScore:
    if n is None:
        return TableScore(value=value)
    low, high = wilson(value / 100, n)
    return TableScore(value=value, low=100 * low, high=100 * high, n=n)


def _average(scores: Sequence[TableScore | None]) -> TableScore | None:
    """Return the mean of all columns with a combined interval; None if one is missing.

    The columns are independent.
    """
    full = [s for s in scores if s is not None and s.low is not None and s.high is not None]
    if len(full) < len(scores):
        return None
    value = sum(score.value for score in full) / len(full)
    down = math.hypot(*(score.value - (score.low or 0.0) for score in full)) / len(full)
    up = math.hypot(*((score.high or 0.0) - score.value for score in full)) / len(full)
    return TableScore(value=value, low=value - down, high=value + up, n=sum(score.n or 0 for score in full))


def to_markdown(table: PaperTable) -> str:
    """Format the table; published rows are marked."""
    names = [column.replace("_", " ") for column in table.columns]
    lines = [["model", *names], ["---", *("---:" for _ in names)]]
    for row in table.rows:
        mark = f" *({NOTE})*" if row.published else ""
        lines.append([f"{row.model}{mark}", *(score.text() if score else "–" for score in row.scores)])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### {table.title}\n\n{body}\n"
