"""The report of a curation: what each step dropped and why, and the distribution of answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blm.corpora.curation.balance import yes_no_turns
from blm.corpora.format.faults import EXAMPLES
from blm.corpora.format.messages import Conversation

LISTED = 12
"""Number of answers listed per kind; the others are counted as "other"."""


@dataclass(frozen=True)
class DropCount:
    """Number of items dropped for one reason, and the first of them."""

    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Counts of one step: `rows_in` = `rows_out` + the number of dropped rows."""

    name: str
    rows_in: int
    rows_out: int
    turns_in: int
    turns_out: int
    reasons: Mapping[str, DropCount]
    """Reason -> dropped conversations; dropped turns in the last two steps."""


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """Counts of one source."""

    read: int
    kept: int
    turns: int
    weight: float
    share: float
    """Share in the training mixture: weight * turns, scaled to the replay share. They sum to 1."""


@dataclass(frozen=True, kw_only=True)
class CurationReport:
    """The kept and dropped conversations, the reasons, and the distribution of answers."""

    settings: Mapping[str, Any]
    """The configuration, and the names of the evaluation sets."""
    kept: int
    dropped: Mapping[str, int]
    """Reason -> conversations, of all steps."""
    steps: Sequence[StepReport]
    sources: Mapping[str, SourceReport]
    before: Mapping[str, Mapping[str, int]]
    """Question kind -> answer -> count over all readable rows; rare answers count as "other"."""
    answers: Mapping[str, Mapping[str, int]]
    """The same for the kept rows."""
    yes_no: Mapping[str, Mapping[str, Sequence[int]]]
    """Base kind of yes/no questions -> "before" and "after" -> numbers of yes and no."""


class DropReasons:
    """Counts drops by reason and keeps the first examples of each."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}

    def add(self, reason: str, place: str) -> None:
        reason, _, detail = reason.partition(" | ")
        self.rows[reason] += 1
        if self.rows[reason] <= EXAMPLES:
            self.places.setdefault(reason, []).append(f"{place} ({detail})" if detail else place)

    def report(self) -> dict[str, DropCount]:
        return {reason: DropCount(n, tuple(self.places[reason])) for reason, n in self.rows.most_common()}


def count_turns(rows: Iterable[Conversation]) -> int:
    return sum(sum(row.learnt) for row in rows)


def answer_counts(rows: Sequence[Conversation]) -> dict[str, dict[str, int]]:
    """Return question kind -> answer -> count; numeric answers are not listed."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        for question in row.questions():
            if question.scorer not in ("point", "box", "metric"):
                found.setdefault(question.kind, Counter())[question.answer] += 1
    listed = {}
    for kind, counter in sorted(found.items()):
        listed[kind] = dict(counter.most_common(LISTED))
        if rest := counter.total() - sum(listed[kind].values()):
            listed[kind]["other"] = rest
    return listed


def yes_no_shares(
    read: Sequence[Conversation], kept: Sequence[Conversation]
) -> dict[str, dict[str, tuple[int, int]]]:
    """Return base kind -> "before" and "after" -> numbers of yes and no."""
    after = yes_no_turns(kept)
    return {
        stem: {
            "before": (len(yes), len(no)),
            "after": (len(after[stem][0]), len(after[stem][1])) if stem in after else (0, 0),
        }
        for stem, (yes, no) in yes_no_turns(read).items()
    }
