"""Precision and recall of the answer extraction on answers that were labelled by hand.

    python benchmarks/extraction.py --half frozen
    python benchmarks/extraction.py --half development --errors

Every answer of `tests/evaluation/digital/answers/` goes through the scorer of its kind. *Right* is
the labelled reading; *lost* is an answer with a reading that was not read; *wrong* is any other
reading, also of an answer that has none. Recall is right / answers with a reading; precision is
right / answers read. The re-implemented rules of other programs (`parsers/compat.py`) are measured
on the same letters.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from blm.evaluation.digital.parsers.compat import COMPAT
from blm.evaluation.digital.parsers.coordinates import Coordinates
from blm.evaluation.digital.parsers.extraction import normalise
from blm.evaluation.digital.scoring import ScoringConfig, score
from blm.evaluation.protocol import DigitalProtocol
from blm.types import Image, Message, Question, Scorer

ANSWERS = Path(__file__).parents[1] / "tests/evaluation/digital/answers"
SCORERS: dict[str, tuple[Scorer, str]] = {
    "choice": ("choice", "A"),
    "yes_no": ("exact", "yes"),
    "length": ("metric", "7 cm"),
    "count": ("exact", "7"),
    "word": ("exact", "purple"),
    "point": ("point", "(7, 7)"),
    "points": ("points", ""),
    "box": ("box", "(7, 7, 8, 8)"),
}
"""Kind -> its scorer and a reference of its type; the reading must not depend on the reference."""
PROTOCOL = DigitalProtocol(items="", count=0, max_tokens=0, prompt="")
Read = Callable[["LabelledAnswer"], str | None]


@dataclass(frozen=True)
class LabelledAnswer:
    """A raw answer with what its reader may know and the reading of a careful human."""

    kind: str
    style: str
    question: str
    answer: str
    reading: Any
    """A letter, yes or no, cm, a count, words or thousandths; None if nothing may be read."""
    why: str
    options: tuple[str, ...] = ()
    unit: str = ""
    coordinates: str = "thousandths"
    size: tuple[int, int] | None = None

    def agrees(self, parsed: str) -> bool:
        """Return whether a parsed answer is the labelled reading; numbers within rounding."""
        if self.reading is None:
            return False
        if self.kind in ("choice", "yes_no", "count"):
            return parsed == self.reading
        if self.kind == "word":
            return normalise(parsed) == normalise(self.reading)
        numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?", parsed)]
        wanted = np.ravel(self.reading).tolist()
        return len(numbers) == len(wanted) and all(
            math.isclose(a, b, rel_tol=0.02, abs_tol=1.0 if self.kind != "length" else 0.05)
            for a, b in zip(numbers, wanted, strict=True)
        )


@dataclass
class Tally:
    """Counts of one kind of answer."""

    answers: int = 0
    readable: int = 0
    right: int = 0
    wrong: int = 0
    misread: int = 0
    """Wrong readings of answers that have a reading; the other wrong ones have none."""

    @property
    def lost(self) -> int:
        return self.readable - self.right - self.misread

    @property
    def recall(self) -> float:
        return self.right / self.readable if self.readable else math.nan

    @property
    def precision(self) -> float:
        read = self.right + self.wrong
        return self.right / read if read else math.nan

    def add(self, one: LabelledAnswer, parsed: str | None) -> None:
        right = parsed is not None and one.agrees(parsed)
        wrong = parsed is not None and not right
        self.answers += 1
        self.readable += one.reading is not None
        self.right += right
        self.wrong += wrong
        self.misread += wrong and one.reading is not None


def load(half: str) -> list[LabelledAnswer]:
    """Load one half of the labelled answers: 'frozen' or 'development'."""
    lines = (ANSWERS / f"{half}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [LabelledAnswer(**{**row, "options": tuple(row.get("options", ()))}) for row in rows]


def read(one: LabelledAnswer) -> str | None:
    """Return what the project's scorer reads in an answer."""
    scorer, reference = SCORERS[one.kind]
    white = Image(pixels=np.full((480, 640, 3), 255, np.uint8))
    question = Question(
        id="answer",
        kind=one.kind,
        messages=(Message("user", (white, one.question)),),
        answer=reference,
        group="",
        scorer=scorer,
        options=one.options,
        mask=white if scorer == "points" else None,
    )
    coordinates = Coordinates.parse(one.coordinates)
    config = ScoringConfig(PROTOCOL, coordinates=coordinates, resize=lambda width, height: (width, height))
    return score(question, one.answer, config).parsed


def measure(answers: Sequence[LabelledAnswer], reader: Read = read) -> dict[str, Tally]:
    """Return the counts of each kind, and of all as "all"."""
    tallies: dict[str, Tally] = {}
    for one in answers:
        parsed = reader(one)
        for kind in (one.kind, "all"):
            tallies.setdefault(kind, Tally()).add(one, parsed)
    tallies["all"] = tallies.pop("all")  # the last row
    return tallies


def table(tallies: dict[str, Tally]) -> str:
    """Return the counts as a Markdown table."""
    lines = ["| kind | answers | readable | right | lost | wrong | recall | precision |"]
    lines.append("|---" * 8 + "|")
    for kind, t in tallies.items():
        counts = f"{t.answers} | {t.readable} | {t.right} | {t.lost} | {t.wrong}"
        lines.append(f"| {kind} | {counts} | {100 * t.recall:.1f} % | {100 * t.precision:.1f} % |")
    return "\n".join(lines)


def upstream_letters(answers: Sequence[LabelledAnswer]) -> dict[str, Tally]:
    """Return the counts of the other programs' rules on the multiple-choice answers."""
    choices = [one for one in answers if one.kind == "choice"]
    tallies = {"this project": measure(choices)["all"]}
    for name, upstream in COMPAT.items():
        if (choice := upstream.choice) is not None:
            tally = tallies[name] = Tally()
            for one in choices:
                letter = choice(one.answer, one.options)
                tally.add(one, None if letter == "Z" else letter)  # VLMEvalKit's mark of a refusal
    return tallies


def main(half: Literal["frozen", "development"], errors: bool = False) -> None:
    answers = load(half)
    print(table(measure(answers)))
    print("\nMultiple choice, other programs' rules on the same answers:\n")
    print(table(upstream_letters(answers)))
    for one in answers if errors else ():
        parsed = read(one)
        if (parsed is None and one.reading is None) or (parsed is not None and one.agrees(parsed)):
            continue
        print(f"\n{one.kind}, {one.style}: {one.answer!r} ({one.coordinates})")
        print(f"  read {parsed!r}, labelled {one.reading!r}: {one.why}")


if __name__ == "__main__":
    tyro.cli(main)
