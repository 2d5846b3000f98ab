"""Baselines without images: the most common training answer of a kind, or of the same question."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from blm.evaluation.digital.parsers.coordinates import read_metric, read_numbers
from blm.evaluation.digital.parsers.extraction import normalise
from blm.types import Question, base_kind

Baseline = Callable[[Question], str]
"""Question -> answer."""


def text_baselines(train: Sequence[Question]) -> dict[str, Baseline]:
    """Fit both baselines to training questions: "majority" and "question_only".

    Both look up the base kind: the full name of a yes or no kind would reveal the answer.
    """
    alike: dict[tuple[str, ...], list[Question]] = defaultdict(list)
    for question in train:
        alike[(base_kind(question.kind),)].append(question)
        alike[base_kind(question.kind), question.messages[-1].text].append(question)
    usual = {key: _most_common_answer(part) for key, part in alike.items()}

    def majority(question: Question) -> str:
        return usual.get((base_kind(question.kind),), "")

    def question_only(question: Question) -> str:
        return usual.get((base_kind(question.kind), question.messages[-1].text), majority(question))

    return {"majority": majority, "question_only": question_only}


def _most_common_answer(questions: Sequence[Question]) -> str:
    """Return the most common answer, or the median of places or lengths."""
    if questions[0].scorer == "facts":  # its clauses count, so it keeps its punctuation
        return Counter(question.answer for question in questions).most_common(1)[0][0]
    read: dict[str, Callable[[str], tuple[float, ...] | None]] = {
        "point": lambda text: next(iter(read_numbers(text, 2)), None),
        "box": lambda text: next(iter(read_numbers(text, 4)), None),
        "metric": read_metric,
    }
    places = [read[q.scorer](q.answer) if q.scorer in read else None for q in questions]
    found = [place for place in places if place is not None]
    usual_length = Counter(map(len, found)).most_common(1)
    if not usual_length:
        return Counter(normalise(question.answer) for question in questions).most_common(1)[0][0]
    same = [place for place in found if len(place) == usual_length[0][0]]
    middle = ", ".join(str(int(value)) for value in np.median(same, axis=0).round())
    text = middle if len(same[0]) == 1 else f"({middle})"
    return f"{text} cm" if questions[0].scorer == "metric" else text
