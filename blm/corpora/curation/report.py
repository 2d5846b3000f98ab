"""What a curation reports: what every step dropped and why, and how the answers are spread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blm.corpora.curation.balance import yes_no_turns
from blm.corpora.format.faults import EXAMPLES
from blm.corpora.format.messages import Conversation

LISTED = 12
"""Answers of a kind that a report lists; the others are counted as "other"."""


@dataclass(frozen=True)
class Dropped:
    """How many went for one reason, and the first of them."""

    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step let through. `rows_in` = `rows_out` + what it dropped of rows."""

    name: str
    rows_in: int
    rows_out: int
    turns_in: int
    turns_out: int
    reasons: Mapping[str, Dropped]
    """Of conversations; of turns for the last two steps."""


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What one source gives."""

    read: int
    kept: int
    turns: int
    weight: float
    share: float
    """Part of what is drawn in training: weight * turns, scaled to the share of replay; all add up to 1."""


@dataclass(frozen=True, kw_only=True)
class CurationReport:
    """What stayed, what went and why, and how the answers are spread."""

    settings: Mapping[str, Any]
    """The configuration, and the names of the evaluation sets."""
    kept: int
    dropped: Mapping[str, int]
    """Reason -> conversations, of all steps."""
    steps: Sequence[StepReport]
    sources: Mapping[str, SourceReport]
    before: Mapping[str, Mapping[str, int]]
    """Question kind -> answer -> count, over all that could be read; the rarest answers as "other"."""
    answers: Mapping[str, Mapping[str, int]]
    """The same of what was kept."""
    yes_no: Mapping[str, Mapping[str, Sequence[int]]]
    """Stem of a yes/no kind -> "before" and "after" -> numbers of yes and no."""


class Reasons:
    """Counts with their first examples."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}

    def add(self, reason: str, place: str) -> None:
        reason, _, detail = reason.partition(" | ")
        self.rows[reason] += 1
        if self.rows[reason] <= EXAMPLES:
            self.places.setdefault(reason, []).append(f"{place} ({detail})" if detail else place)

    def report(self) -> dict[str, Dropped]:
        return {reason: Dropped(n, tuple(self.places[reason])) for reason, n in self.rows.most_common()}


def count_turns(rows: Iterable[Conversation]) -> int:
    return sum(len(row.kinds) for row in rows)


def spread_of(rows: Sequence[Conversation]) -> dict[str, dict[str, int]]:
    """Return question kind -> answer -> count; points, boxes and lengths are not listed."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        for question in row.questions():
            if question.scorer not in ("point", "box", "metric"):
                found.setdefault(question.kind, Counter())[question.answer] += 1
    spread = {}
    for kind, counter in sorted(found.items()):
        spread[kind] = dict(counter.most_common(LISTED))
        if rest := counter.total() - sum(spread[kind].values()):
            spread[kind]["other"] = rest
    return spread


def yes_no_shares(
    read: Sequence[Conversation], kept: Sequence[Conversation]
) -> dict[str, dict[str, tuple[int, int]]]:
    """Return stem -> "before" and "after" -> numbers of yes and no."""
    after = yes_no_turns(kept)
    return {
        stem: {
            "before": (len(yes), len(no)),
            "after": (len(after[stem][0]), len(after[stem][1])) if stem in after else (0, 0),
        }
        for stem, (yes, no) in yes_no_turns(read).items()
    }
