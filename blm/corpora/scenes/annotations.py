"""From annotations to questions: an annotation has a kind, template words and an answer.

Each moment offers many annotations. They are sampled so that, over a whole shard, no answer to a
question is much more frequent than the others. A model that only reads the text then learns little.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from blm.corpora.format.messages import with_thought
from blm.corpora.scenes.sentences import BRIEF, sentence
from blm.corpora.scenes.templates import TEMPLATES, Wording
from blm.tasks.wordings import expand
from blm.types import Image, ImageArray, KeyFacts, Message, base_kind

NUMERIC_KINDS = ("point", "box", "metric")
"""Prefixes of kinds with numeric answers, which need no balancing."""
BINARY_ANSWERS = (
    "yes",
    "no",
    "left",
    "right",
    "front",
    "behind",
    "above",
    "below",
    "in the air",
    "on the table",
)
"""Answers of questions with two possible answers."""
MAX_BINARY_SHARE = 0.5
"""Maximum share of a binary answer among the answers to one question."""
MAX_OTHER_SHARE = 0.4
"""Maximum share of any other answer among the answers to one question."""
LETTERS = "ABCD"
"""Letters of the options of a multiple choice."""


@dataclass(frozen=True)
class QuestionTurn:
    """One question and its answer."""

    kind: str
    question: str
    answer: str
    thought: str = ""
    """Reasoning from which the answer follows; a model may write it before its answer."""
    facts: KeyFacts | None = None
    """Key facts of a free question."""
    before: str = ""
    """Text in front of the images; only the first turn of a conversation can have it."""


@dataclass(frozen=True)
class Annotation:
    """A labelled fact about one moment that can be asked about."""

    kind: str
    answer: str
    words: Mapping[str, str] = field(default_factory=dict)
    """Words that fill the template, e.g. "thing" -> "red cube"."""
    wrong: tuple[str, ...] = ()
    """Wrong options for a multiple choice; if empty, the question is always open."""
    thought: str = ""
    """Reasoning from which the answer follows; empty if the answer is visible at once."""

    @property
    def subject(self) -> tuple[str, ...]:
        """The question independent of its wording and answer."""
        return base_kind(self.kind), *self.words.values()


@dataclass
class QuestionSampler:
    """Samples annotations, keeps their answers balanced, and phrases them as questions."""

    rng: np.random.Generator
    wording: Wording = "seen"
    choice: float = 0.25
    """Fraction of multiple choice among the questions that allow it."""
    letters: bool = True
    """Whether a multiple choice is answered by its letter or by the option's text.

    Answer extraction reads both. A small model learns the words long before it learns which letter
    belongs to an option (docs/LOG.md).
    """
    brief: float | None = None
    """Fraction of questions that ask for the answer only; the others are answered in sentences.

    None: no question asks for it, and all answers are short.
    """
    answered: Counter[tuple[str, ...]] = field(default_factory=Counter)

    def sample(self, annotations: Sequence[Annotation]) -> Annotation | None:
        """Sample one of these annotations, which share a kind; prefer rare answers.

        Among annotations with the chosen answer, questions that got it least often are preferred.
        Returns None if every annotation would make its answer too frequent.
        """
        if not annotations or annotations[0].kind.startswith(NUMERIC_KINDS):
            return annotations[int(self.rng.integers(len(annotations)))] if annotations else None
        stem = base_kind(annotations[0].kind)
        answers = sorted({annotation.answer for annotation in annotations})
        rare = np.array([1.0 / (1 + self.answered[stem, answer]) ** 2 for answer in answers])
        for answer in self.rng.choice(answers, len(answers), replace=False, p=rare / rare.sum()):
            fitting = [f for f in annotations if f.answer == answer and self._allows(f)]
            if fitting:
                excess = np.array([self._excess(annotation) for annotation in fitting])
                return self._note(fitting[int(self.rng.choice(np.flatnonzero(excess == excess.min())))])
        return None

    def _allows(self, annotation: Annotation) -> bool:
        """Return whether the answer stays within its maximum share, for question and kind."""
        share = MAX_BINARY_SHARE if annotation.answer in BINARY_ANSWERS else MAX_OTHER_SHARE
        spent = [(self.answered[*key, annotation.answer], self.answered[key]) for key in _levels(annotation)]
        return all(got < 1 + share * asked for got, asked in spent)

    def _excess(self, annotation: Annotation) -> int:
        """Return the count of this answer to this question minus that of all its other answers."""
        return 2 * self.answered[*annotation.subject, annotation.answer] - self.answered[annotation.subject]

    def _note(self, annotation: Annotation) -> Annotation:
        self.answered.update(name for key in _levels(annotation) for name in (key, (*key, annotation.answer)))
        return annotation

    def phrase(self, annotation: Annotation) -> QuestionTurn:
        """Phrase an annotation with a random template, a fraction `choice` as multiple choice."""
        turn = self._phrase_briefly(annotation)
        if self.brief is None:
            return turn
        choice = turn.kind.endswith("_choice")
        if self.rng.random() < self.brief:
            between = "\n" if choice else " "
            return replace(turn, question=f"{turn.question}{between}{BRIEF}", thought="")
        if choice:
            answer = f"({turn.answer}) {annotation.answer}" if self.letters else annotation.answer
        else:
            answer = sentence(annotation.kind, annotation.answer, annotation.words)
        return replace(turn, answer=answer, thought="")

    def _phrase_briefly(self, annotation: Annotation) -> QuestionTurn:
        pattern = str(self.rng.choice(getattr(TEMPLATES[annotation.kind], self.wording)))
        wording = str(self.rng.choice(expand(pattern)))
        question = re.sub(r"\ba (?=[aeiou])", "an ", wording.format(**annotation.words))
        if not annotation.wrong or self.rng.random() >= self.choice:
            return QuestionTurn(annotation.kind, question, annotation.answer, annotation.thought)
        count = min(len(annotation.wrong), int(self.rng.integers(1, len(LETTERS))))
        options = [*map(str, self.rng.choice(sorted(annotation.wrong), count, replace=False))]
        right = int(self.rng.integers(count + 1))
        options.insert(right, annotation.answer)
        lines = (f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
        answer = LETTERS[right] if self.letters else annotation.answer
        return QuestionTurn(
            f"{annotation.kind}_choice", "\n".join([question, *lines]), answer, annotation.thought
        )

    def sample_turns(self, groups: Mapping[str, Sequence[Annotation]], count: int) -> list[QuestionTurn]:
        """Sample one question of each of at most `count` kinds."""
        kinds = [kind for kind in sorted(groups) if groups[kind]]
        order = self.rng.permutation(len(kinds))
        annotations = (self.sample(groups[kinds[index]]) for index in order)
        drawn = [
            annotation
            for _, annotation in zip(range(count), (f for f in annotations if f is not None), strict=False)
        ]
        return [self.phrase(annotation) for annotation in drawn]


def _levels(annotation: Annotation) -> set[tuple[str, ...]]:
    """Return the keys under which answers are counted: the question, and all questions of its kind."""
    return {annotation.subject, (base_kind(annotation.kind),)}


def by_kind(annotations: Iterable[Annotation]) -> dict[str, list[Annotation]]:
    """Group annotations by base kind, so that the yes and no kinds of a pair come together."""
    groups: dict[str, list[Annotation]] = {}
    for annotation in annotations:
        groups.setdefault(base_kind(annotation.kind), []).append(annotation)
    return groups


def to_messages(
    images: Sequence[ImageArray], turns: Sequence[QuestionTurn], *, thoughts: bool
) -> tuple[Message, ...]:
    """Return the messages of one conversation; the first question holds the images."""
    pictures = tuple(Image(image) for image in images)
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        assert index == 0 or not turn.before, "a later turn cannot have text in front of the images"
        before = (turn.before,) if turn.before else ()
        shown = (*before, *pictures) if index == 0 else ()
        messages.append(Message("user", (*shown, turn.question)))
        answer = with_thought(turn.thought, turn.answer) if thoughts else turn.answer
        messages.append(Message("assistant", (answer,)))
    return tuple(messages)
