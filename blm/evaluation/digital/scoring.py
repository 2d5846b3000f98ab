"""From a model's words to right or wrong. A change of rule raises `DigitalProtocol.parser`.

What cannot be read counts as wrong. The answer is what follows the reasoning: the last <answer> tag, else
the last line "Answer: ...", else everything. Equality is of words: lower case, no punctuation, no articles,
numbers as digits. A point is the first "(x, y)" of integers 0..1000 (thousandths of image width and height).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from blm.types import Question

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_POINT = re.compile(r"[(\[]\s*(\d+)\s*,\s*(\d+)\s*[)\]]")


@dataclass(frozen=True)
class Scored:
    """The verdict on one answer."""

    correct: bool
    parsed: str | None
    """What was read; None when nothing could be."""
    error: float | None = None
    """Distance to the reference point in thousandths of the image; None for other kinds and unread ones."""


def score(question: Question, raw: str, point_radius: float) -> Scored:
    """Judge a raw answer."""
    text = extract(raw)
    if question.scorer == "exact":
        return Scored(normalise(text) == normalise(question.answer) and text != "", text or None)
    point, reference = parse_point(text), parse_point(question.answer)
    assert reference is not None, f"question {question.id}: the reference {question.answer!r} is no point"
    if point is None:
        return Scored(False, None)
    error = math.dist(point, reference)
    return Scored(error <= point_radius, f"({point[0]}, {point[1]})", error)


def extract(raw: str) -> str:
    """The answer without the reasoning around it; empty when the reasoning was cut off before an answer."""
    text = re.sub(r"<think>.*?</think>", "", raw, flags=re.DOTALL | re.IGNORECASE)
    if re.search(r"<think>", text, re.IGNORECASE):
        return ""
    text = re.split(r"</think>", text, flags=re.IGNORECASE)[-1]  # the prompt may have opened the tag
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL | re.IGNORECASE)
    label = r"^[\s*_#]*(?:final )?answer[\s*_]*:[\s*_]*(.+)$"
    labelled = re.findall(label, text, re.MULTILINE | re.IGNORECASE)
    return [text, *labelled[-1:], *tagged[-1:]][-1].strip(" \t\n*_")


def normalise(text: str) -> str:
    """Words and numbers only, in one form."""
    words = [_DIGITS.get(word, word) for word in re.findall(r"-?\d+(?:\.\d+)?|\w+", text.lower())]
    kept = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(kept or words)  # an answer may be the letter A


def parse_point(text: str) -> tuple[int, int] | None:
    """The first "(x, y)" in text; None when there is none or it lies outside 0..1000."""
    found = _POINT.search(text)
    if found is None:
        return None
    x, y = int(found[1]), int(found[2])
    return (x, y) if max(x, y) <= 1000 else None
