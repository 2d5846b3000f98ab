"""LLM judge: grades a free-form answer against the reference as 0, 0.5 or 1.

EgoThink and ShareRobot grade in the same way. The judge sees text only. Its reply must contain
exactly one rating, [[0]], [[0.5]] or [[1]]; any other reply is a failed judgement: the answer
scores 0, counts as failed, and is neither judged again nor left out. The prompt is ours (EgoThink's
rubric in other words); its hash and the judge's name are part of the protocol.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import track

from blm.evaluation.digital.answers import Answer, AnswerCache, AnswerError, answer_all
from blm.evaluation.digital.calibration import CALIBRATION
from blm.evaluation.digital.parsers.compat import COMPAT
from blm.evaluation.digital.parsers.extraction import normalise, without_reasoning
from blm.evaluation.digital.result import JudgeCalibration
from blm.evaluation.protocol import digest
from blm.types import Chat, Message

SYSTEM = (
    "You grade short answers to questions about pictures and robot videos. You are strict, fair and brief."
)
PROMPT = """Compare the answer with the reference. You cannot see the picture: the reference is the truth.

Question: {question}

Reference answer: {reference}

Answer to grade: {answer}

Give 1 if the answer means the same as the reference, in whatever words and at whatever length.
Give 0.5 if it is partly right: it has part of what the reference says, or is right but vague, and nothing
in it is wrong in a way that matters.
Give 0 if it is wrong, contradicts the reference, refuses, names no answer, or hedges between several.
Length and style do not count. Say in one sentence why, then the rating on a line of its own, exactly so:
Rating: [[1]] or Rating: [[0.5]] or Rating: [[0]]"""
MAX_TOKENS = 512
"""Maximum length of the judge's reply [tokens]."""
_RATING = r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]"
_JOINED = re.compile(
    rf"(?:rating:?\s*)?{_RATING}(?:[\s,/|]*(?:or)?\s*(?:rating:?\s*)?{_RATING}){{2,}}", re.IGNORECASE
)
"""Three ratings or more in a row, as the prompt's last line has them."""
_FINAL = re.compile(rf"^\W*rating\W*{_RATING}\W*$", re.MULTILINE | re.IGNORECASE)
BATCH = 64
"""Number of answers graded per batch."""


@dataclass(frozen=True)
class AnswerToGrade:
    """A free-form answer with its question and reference."""

    question: str
    reference: str
    answer: str


@dataclass(frozen=True)
class Verdict:
    """The judge's grade of one answer."""

    score: float | None
    """0, 0.5 or 1; None for a failed judgement."""
    reply: str


class Judge(Protocol):
    """Grades free-form answers."""

    @property
    def name(self) -> str:
        """Name of the judging model; part of the protocol."""
        ...

    @property
    def prompt(self) -> str:
        """Hash of the prompt; part of the protocol."""
        ...

    def grade(self, answers: Sequence[AnswerToGrade]) -> list[Verdict]: ...


class LanguageJudge:
    """Any Chat as judge; use temperature 0. `cache` stores its replies on disk."""

    def __init__(self, chat: Chat, name: str, *, cache: Path | None = None, compat: str = "") -> None:
        """`compat` is the entry of COMPAT whose rating parser is used."""
        self.chat = chat
        self.name = name
        self.prompt = digest([SYSTEM, PROMPT, MAX_TOKENS])
        self._cache = AnswerCache(cache)
        self._read = (compat and COMPAT[compat].rating) or read_rating

    def grade(self, answers: Sequence[AnswerToGrade]) -> list[Verdict]:
        """Grade all answers that are not cached. Raises BlmError when the judge cannot be reached."""
        keys = {self._key(answer): answer for answer in answers}
        todo = [key for key in keys if self._cache.get(key) is None]
        fresh: dict[str, str] = {}
        batches = [todo[start : start + BATCH] for start in range(0, len(todo), BATCH)]
        for batch in track(batches, "judging", console=Console(stderr=True), disable=not batches):
            prompts = [_messages(keys[key]) for key in batch]
            for key, reply in zip(batch, answer_all(self.chat, prompts, MAX_TOKENS), strict=True):
                fresh[key] = f"(no reply: {reply})" if isinstance(reply, AnswerError) else reply
                if isinstance(reply, str):
                    self._cache.put(key, Answer(reply))
        kept = {key: found.text for key in keys if (found := self._cache.get(key)) is not None}
        replies = [fresh.get(key) or kept.get(key, "") for key in map(self._key, answers)]
        return [Verdict(self._read(reply), reply) for reply in replies]

    def _key(self, graded: AnswerToGrade) -> str:
        return AnswerCache.key(self.prompt, self.name, graded.question, graded.reference, graded.answer)


class MatchJudge:
    """String match instead of a model: 1 if the answer contains the reference."""

    name = "exact-or-contained match (not the paper's metric)"
    prompt = ""

    def grade(self, answers: Sequence[AnswerToGrade]) -> list[Verdict]:
        return [Verdict(float(_contained(graded.reference, graded.answer)), "") for graded in answers]


def _contained(reference: str, answer: str) -> bool:
    words = normalise(reference)
    return bool(words) and re.search(rf"\b{re.escape(words)}\b", normalise(answer)) is not None


def _messages(graded: AnswerToGrade) -> tuple[Message, ...]:
    return Message("system", (SYSTEM,)), Message("user", (PROMPT.format(**asdict(graded)),))


def read_rating(reply: str) -> float | None:
    """Return the rating in a reply after its reasoning; None unless exactly one is found.

    A repeated rubric is no rating: neither three ratings in a row nor, if all three are named
    elsewhere too, any but the one on a line "Rating: [[1]]".
    """
    said = _JOINED.sub(" ", without_reasoning(reply))
    found = {float(value) for value in re.findall(_RATING, said)}
    if found == {0.0, 0.5, 1.0}:
        found = {float(value) for value in _FINAL.findall(said)}
    return found.pop() if len(found) == 1 and found <= {0.0, 0.5, 1.0} else None


def calibrate(judge: Judge) -> JudgeCalibration:
    """Let the judge grade answers whose grades are known."""
    answers = [AnswerToGrade(question, reference, answer) for question, reference, answer, _ in CALIBRATION]
    verdicts = judge.grade(answers)
    pairs = [(verdict.score, label) for verdict, (*_, label) in zip(verdicts, CALIBRATION, strict=True)]
    gaps = [abs((given if given is not None else 0.0) - label) for given, label in pairs]
    return JudgeCalibration(
        n=len(pairs),
        agree=sum(given == label for given, label in pairs),
        failed=sum(given is None for given, _ in pairs),
        mean_gap=sum(gaps) / len(gaps),
    )
