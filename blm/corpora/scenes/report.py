"""Statistics of a corpus: its questions, and how many of them the text alone can answer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from blm.corpora.format.messages import Conversation, without_thought
from blm.types import base_kind


@dataclass(frozen=True, kw_only=True)
class KindSummary:
    """Statistics of one question kind; a pair of yes and no kinds counts as one."""

    kind: str
    questions: int
    texts: int
    """Number of different question texts."""
    answers: Mapping[str, int]
    """Answer -> count, the most frequent first."""
    blind: float | None
    """Accuracy of the most frequent training answer to the same text, on held-out questions.

    For a new text it is the most frequent answer of the kind. None without held-out questions.
    """


def describe(
    training: Iterable[Conversation], held_out: Iterable[Conversation] = ()
) -> tuple[KindSummary, ...]:
    """Summarise every question kind of a training corpus.

    The questions of `held_out` are answered from the texts of the training corpus alone.
    """
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
    """Return base kind, question text and answer of every turn."""
    found = []
    for row in conversations:
        asked = [message.text for message in row.messages if message.role == "user"]
        answers = [without_thought(message.text) for message in row.messages if message.role == "assistant"]
        for kind, text, answer in zip(row.kinds, asked, answers, strict=True):
            found.append((kind if kind.endswith("_choice") else base_kind(kind), text, answer))
    return found
