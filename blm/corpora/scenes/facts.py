"""From facts to questions: a fact has a kind, the words that fill its wording, and an answer.

A moment offers many facts; which of them are asked is drawn such that, over a whole shard, no answer
to a question is much more common than the others: a model that only reads the text then learns little.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from blm.corpora.format.messages import spoken_after
from blm.corpora.scenes.templates import TEMPLATES, Wording, expansions
from blm.types import Image, ImageArray, Message

OPEN = ("point", "box", "metric")
"""Kinds with numbers as answers: nothing to balance."""
EVEN = ("yes", "no", "left", "right", "front", "behind", "above", "below", "in the air", "on the table")
"""Answers of questions that have but two."""
BINARY, OTHERS = 0.5, 0.4
"""Greatest share of an answer among those to one question: of these, of all others."""
LETTERS = "ABCD"


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    kind: str
    question: str
    answer: str
    thought: str = ""
    """What a model may write before its answer: what the answer follows from."""


@dataclass(frozen=True)
class Fact:
    """Something that can be asked about a moment."""

    kind: str
    answer: str
    words: Mapping[str, str] = field(default_factory=dict)
    """What fills the wording: "thing" -> "red cube"."""
    wrong: tuple[str, ...] = ()
    """Wrong answers that a multiple choice may offer; none: it is asked freely only."""
    thought: str = ""
    """What the answer follows from; none: it is seen at once."""

    @property
    def subject(self) -> tuple[str, ...]:
        """What is asked, however it is worded and answered."""
        return stem_of(self.kind), *self.words.values()


def stem_of(kind: str) -> str:
    """The kind without what tells its answer or form: pairs of yes and no share it."""
    return re.sub(r"(_positive|_negative|_choice)$", "", kind)


@dataclass
class Drawer:
    """Draws facts and words them; remembers what was asked so that answers stay balanced."""

    rng: np.random.Generator
    wording: Wording = "seen"
    choice: float = 0.25
    """Share of multiple choice among the questions that allow it."""
    letters: bool = True
    """Answer a multiple choice by its letter, else by the option's words: extraction reads both. A small
    model learns words long before it learns which letter stands before them (docs/LOG.md)."""
    answered: Counter[tuple[str, ...]] = field(default_factory=Counter)

    def draw(self, facts: Sequence[Fact]) -> Fact | None:
        """Pick one of these facts of one kind: a rare answer first, then a question that lacks it.

        None when each would make an answer too common.
        """
        if not facts or facts[0].kind.startswith(OPEN):
            return facts[int(self.rng.integers(len(facts)))] if facts else None
        stem, answers = stem_of(facts[0].kind), sorted({fact.answer for fact in facts})
        rare = np.array([1.0 / (1 + self.answered[stem, answer]) ** 2 for answer in answers])
        for answer in self.rng.choice(answers, len(answers), replace=False, p=rare / rare.sum()):
            fitting = [f for f in facts if f.answer == answer and self._allows(f)]
            if fitting:
                excess = np.array([self._excess(fact) for fact in fitting])
                return self._note(fitting[int(self.rng.choice(np.flatnonzero(excess == excess.min())))])
        return None

    def _allows(self, fact: Fact) -> bool:
        """Whether the answer stays within its share, of this question and of all questions of the kind."""
        share = BINARY if fact.answer in EVEN else OTHERS
        spent = [(self.answered[*key, fact.answer], self.answered[key]) for key in _levels(fact)]
        return all(got < 1 + share * asked for got, asked in spent)

    def _excess(self, fact: Fact) -> int:
        """How much more often this question got this answer than any other answer."""
        return 2 * self.answered[*fact.subject, fact.answer] - self.answered[fact.subject]

    def _note(self, fact: Fact) -> Fact:
        self.answered.update(name for key in _levels(fact) for name in (key, (*key, fact.answer)))
        return fact

    def word(self, fact: Fact) -> Turn:
        """Put a fact into words, as a multiple choice now and then."""
        pattern = str(self.rng.choice(getattr(TEMPLATES[fact.kind], self.wording)))
        wording = str(self.rng.choice(expansions(pattern)))
        question = re.sub(r"\ba (?=[aeiou])", "an ", wording.format(**fact.words))
        if not fact.wrong or self.rng.random() >= self.choice:
            return Turn(fact.kind, question, fact.answer, fact.thought)
        count = min(len(fact.wrong), int(self.rng.integers(1, len(LETTERS))))
        options = [*map(str, self.rng.choice(sorted(fact.wrong), count, replace=False))]
        right = int(self.rng.integers(count + 1))
        options.insert(right, fact.answer)
        lines = (f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
        answer = LETTERS[right] if self.letters else fact.answer
        return Turn(f"{fact.kind}_choice", "\n".join([question, *lines]), answer, fact.thought)

    def ask(self, groups: Mapping[str, Sequence[Fact]], count: int) -> list[Turn]:
        """Ask one question of each of `count` kinds at most."""
        kinds = [kind for kind in sorted(groups) if groups[kind]]
        order = self.rng.permutation(len(kinds))
        facts = (self.draw(groups[kinds[index]]) for index in order)
        drawn = [fact for _, fact in zip(range(count), (f for f in facts if f is not None), strict=False)]
        return [self.word(fact) for fact in drawn]


def _levels(fact: Fact) -> set[tuple[str, ...]]:
    """Where answers are counted: for the question, and for all questions of its kind."""
    return {fact.subject, (stem_of(fact.kind),)}


def by_kind(facts: Iterable[Fact]) -> dict[str, list[Fact]]:
    """Sort facts by kind; the yes and the no of a pair come together."""
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(stem_of(fact.kind), []).append(fact)
    return groups


def to_messages(
    images: Sequence[ImageArray], turns: Sequence[Turn], *, thoughts: bool
) -> tuple[Message, ...]:
    """One conversation, with or without thoughts: the pictures come with the first question."""
    pictures = tuple(Image(image) for image in images)
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        messages.append(Message("user", (*pictures, turn.question) if index == 0 else (turn.question,)))
        answer = spoken_after(turn.thought, turn.answer) if thoughts else turn.answer
        messages.append(Message("assistant", (answer,)))
    return tuple(messages)
