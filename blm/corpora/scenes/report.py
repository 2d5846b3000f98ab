"""What a corpus asks, and how much of it can be answered without looking: a leaky kind is seen at once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from blm.corpora.format.messages import Conversation, spoken
from blm.corpora.scenes.facts import stem_of


@dataclass(frozen=True, kw_only=True)
class KindSummary:
    """One kind of question; a pair of yes and no is one kind here."""

    kind: str
    questions: int
    texts: int
    """Different question texts."""
    answers: Mapping[str, int]
    """Answer -> how often, the commonest first."""
    blind: float | None
    """Share of held-out questions that the commonest training answer to the very same text gets right (to a
    new text, the commonest answer of the kind); None without held-out questions of the kind."""


def describe(
    training: Iterable[Conversation], held_out: Iterable[Conversation] = ()
) -> tuple[KindSummary, ...]:
    """Summarise every kind of question of a training corpus; `held_out` is answered from its texts."""
    learnt, asked = _triples(training), _triples(held_out)
    by_text: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, text, answer in learnt:
        by_text[kind, text][answer] += 1
        by_kind[kind][answer] += 1
    hits: dict[str, list[bool]] = defaultdict(list)
    for kind, text, answer in asked:
        known = by_text.get((kind, text)) or by_kind.get(kind) or Counter()
        hits[kind].append(bool(known) and known.most_common(1)[0][0] == answer)
    return tuple(
        KindSummary(
            kind=kind,
            questions=answers.total(),
            texts=sum(text[0] == kind for text in by_text),
            answers=dict(answers.most_common()),
            blind=sum(hits[kind]) / len(hits[kind]) if hits[kind] else None,
        )
        for kind, answers in sorted(by_kind.items())
    )


def _triples(conversations: Iterable[Conversation]) -> Sequence[tuple[str, str, str]]:
    """Kind (without _positive and _negative), question text, answer of every turn."""
    found = []
    for row in conversations:
        asked = [message.text for message in row.messages if message.role == "user"]
        answers = [spoken(message.text) for message in row.messages if message.role == "assistant"]
        for kind, text, answer in zip(row.kinds, asked, answers, strict=True):
            found.append((kind if kind.endswith("_choice") else stem_of(kind), text, answer))
    return found
