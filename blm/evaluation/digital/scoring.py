"""From a model's words to a score from 0 to 1. A change of rule raises `DigitalProtocol.parser`.

What cannot be read scores 0 and is counted. Equality is of words: lower case, no punctuation, no articles,
numbers as digits; where the reference is yes or no, a leading yes or no is the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blm.evaluation.digital.parsers.compat import COMPAT, Upstream, share_inside
from blm.evaluation.digital.parsers.coordinates import (
    THOUSANDTHS,
    Coordinates,
    inside,
    read_metric,
    read_numbers,
)
from blm.evaluation.digital.parsers.extraction import final_answer, normalise, read_choice, read_yes_no
from blm.evaluation.protocol import DigitalProtocol
from blm.media import load_pixels
from blm.types import BlmError, ImageArray, Question, Scorer


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The verdict on one answer."""

    score: float
    """0 wrong .. 1 right."""
    parsed: str | None
    """What was read; None when nothing could be."""
    error: float | None = None
    """Distance of a point to the reference in thousandths of the image, or of a length in cm."""
    points: int | None = None
    """How many points were given, where several may be."""


UNREAD = Scored(score=0.0, parsed=None)


@dataclass(frozen=True)
class Rules:
    """What an answer is judged by."""

    protocol: DigitalProtocol
    coordinates: Coordinates = THOUSANDTHS
    root: Path | None = None
    """Folder of pictures and masks."""

    @property
    def upstream(self) -> Upstream | None:
        return COMPAT[self.protocol.compat] if self.protocol.compat else None


def score(question: Question, raw: str, rules: Rules) -> Scored:
    """Judge a raw answer; questions for a judge are only read, not scored."""
    return _SCORERS[question.scorer](question, raw, rules)


def _exact(question: Question, raw: str, rules: Rules) -> Scored:
    text, reference = final_answer(raw), normalise(question.answer)
    if reference in ("yes", "no"):
        said = read_yes_no(text)
        return Scored(score=float(said == reference), parsed=said)
    return Scored(score=float(normalise(text) == reference and text != ""), parsed=text or None)


def _choice(question: Question, raw: str, rules: Rules) -> Scored:
    upstream = rules.upstream
    if upstream and upstream.choice:
        letter = upstream.choice(raw, question.options)
    else:
        letter = read_choice(final_answer(raw), question.options)
    right = letter is not None and letter.lower() == question.answer.strip(" ().").lower()
    return Scored(score=float(right), parsed=letter)


def _point(question: Question, raw: str, rules: Rules) -> Scored:
    reference = _reference(question, 2)
    found = read_numbers(final_answer(raw), 2, rules.coordinates, picture_size(question, rules))
    if not found or not inside(found[0]):
        return UNREAD
    error = math.dist(found[0], reference)
    return Scored(score=float(error <= rules.protocol.point_radius), parsed=_show(found[0]), error=error)


def _points(question: Question, raw: str, rules: Rules) -> Scored:
    """Share of the points on the mask; a point outside the picture is a miss."""
    if question.mask is None:
        raise BlmError(f"question '{question.id}' is about points, but has no mask")
    grey: ImageArray = load_pixels(question.mask, rules.root)[..., 0]
    height, width = grey.shape
    upstream = rules.upstream
    if upstream and upstream.points and upstream.mask:
        pixels = upstream.points(raw, width, height)
        shown = "; ".join(_show(pixel) for pixel in pixels[:20])
        share = share_inside(pixels, upstream.mask(grey))
        return Scored(score=share, parsed=shown or None, points=len(pixels))
    found = read_numbers(final_answer(raw), 2, rules.coordinates, (width, height))
    if not found:
        return Scored(score=0.0, parsed=None, points=0)
    hits = [inside(place) and _white(grey, place) for place in found]
    return Scored(score=float(np.mean(hits)), parsed="; ".join(map(_show, found)), points=len(found))


def _white(grey: ImageArray, place: Sequence[float]) -> bool:
    """Whether the pixel at a place in thousandths is white."""
    row, column = (
        min(int(p * side / 1000 + 1e-9), side - 1) for p, side in zip(place[::-1], grey.shape, strict=True)
    )
    return bool(grey[row, column] > 127)


def _box(question: Question, raw: str, rules: Rules) -> Scored:
    reference = _reference(question, 4)
    found = read_numbers(final_answer(raw), 4, rules.coordinates, picture_size(question, rules))
    if not found or not inside(found[0]) or found[0][0] >= found[0][2] or found[0][1] >= found[0][3]:
        return UNREAD
    right = overlap(found[0], reference) >= rules.protocol.box_overlap
    return Scored(score=float(right), parsed=_show(found[0]))


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - shared
    return shared / union if union > 0 else 0.0


def _metric(question: Question, raw: str, rules: Rules) -> Scored:
    reference, found = read_metric(question.answer), read_metric(final_answer(raw))
    if reference is None:
        raise BlmError(f"question '{question.id}': the reference {question.answer!r} is no length in cm")
    if found is None or len(found) != len(reference):
        return UNREAD
    error = math.dist(found, reference)
    return Scored(
        score=float(error <= rules.protocol.metric_radius), parsed=f"{_show(found)} cm", error=error
    )


def _judge(question: Question, raw: str, rules: Rules) -> Scored:
    return Scored(score=0.0, parsed=final_answer(raw) or None)


def _reference(question: Question, count: int) -> tuple[float, ...]:
    found = read_numbers(question.answer, count)
    if not found:
        raise BlmError(f"question '{question.id}': the reference {question.answer!r} is no {question.scorer}")
    return found[0]


def picture_size(question: Question, rules: Rules) -> tuple[int, int] | None:
    """Width and height of the question's last picture, where the model's coordinates depend on it."""
    if rules.coordinates.kind != "pixels" or rules.coordinates.size:
        return None
    pictures = [image for message in question.messages for image in message.images]
    if not pictures:
        raise BlmError(f"question '{question.id}' has no picture; pixels of what? Say pixels:WIDTHxHEIGHT")
    height, width = load_pixels(pictures[-1], rules.root).shape[:2]
    return width, height


def _show(values: Sequence[float]) -> str:
    text = ", ".join(f"{value:g}" for value in values)
    return text if len(values) == 1 else f"({text})"


_SCORERS: dict[Scorer, Callable[[Question, str, Rules], Scored]] = {
    "exact": _exact,
    "choice": _choice,
    "point": _point,
    "points": _points,
    "box": _box,
    "metric": _metric,
    "judge": _judge,
}
