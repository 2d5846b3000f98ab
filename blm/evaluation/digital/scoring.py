"""Scorers: from a raw answer to a score from 0 to 1.

A changed rule needs a new version in `DigitalProtocol.parser`.

An answer that cannot be parsed scores 0 and is counted. Exact match compares words: lower case, no
punctuation, no articles, numbers as digits; if the reference is yes or no, a leading yes or no is
the answer. Answers in free words are scored by their facts (see blm.evaluation.digital.facts).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blm.evaluation.digital.facts import FactCheck, check_facts
from blm.evaluation.digital.parsers.compat import COMPAT, Upstream, mean_mask_value
from blm.evaluation.digital.parsers.coordinates import (
    THOUSANDTHS,
    Coordinates,
    inside,
    read_metric,
    read_numbers,
)
from blm.evaluation.digital.parsers.extraction import (
    final_answer,
    normalise,
    read_choice,
    read_count,
    read_words,
    read_yes_no,
    short_answer,
)
from blm.evaluation.protocol import DigitalProtocol
from blm.media import load_pixels
from blm.types import BlmError, ImageArray, Question, Scorer


@dataclass(frozen=True, kw_only=True)
class ItemScore:
    """The score of one answer."""

    score: float
    """0 wrong .. 1 right."""
    parsed: str | None
    """The parsed answer; None if it could not be parsed."""
    error: float | None = None
    """Distance of a point to the reference [thousandths of the image], or of a length [cm]."""
    points: int | None = None
    """Number of points, if several may be given."""
    facts: FactCheck | None = None
    """The key facts in an answer in free words."""


UNREAD = ItemScore(score=0.0, parsed=None)
_TRUTH = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
"""Reference answer to a yes/no question -> the reading that is right."""


Resize = Callable[[int, int], tuple[int, int]]
"""Width and height of a picture -> those after a processor resized it [px]."""


@dataclass(frozen=True)
class ScoringConfig:
    """The rules by which all answers of a benchmark are scored."""

    protocol: DigitalProtocol
    coordinates: Coordinates = THOUSANDTHS
    root: Path | None = None
    """Folder of images and masks."""
    resize: Resize | None = None
    """How the model's processor resizes a picture; needed for pixels "as the model saw it"."""

    @property
    def upstream(self) -> Upstream | None:
        return COMPAT[self.protocol.compat] if self.protocol.compat else None


def score(question: Question, raw: str, config: ScoringConfig) -> ItemScore:
    """Score a raw answer. An answer for the judge is only parsed; its score is 0 until then."""
    return _SCORERS[question.scorer](question, raw, config)


def _exact(question: Question, raw: str, config: ScoringConfig) -> ItemScore:
    """Compare words. The reference decides only the type of answer that is read.

    An answer that equals the reference word by word is right in any case.
    """
    text, reference = short_answer(raw), normalise(question.answer)
    if reference in _TRUTH:
        truth = read_yes_no(text)
        return ItemScore(score=float(truth == _TRUTH[reference]), parsed=truth)
    number = re.fullmatch(r"-?\d+(?:\.\d+)?", reference)
    said = read_count(text) if number else read_words(text)
    if text and normalise(text) == reference:
        return ItemScore(score=1.0, parsed=text)
    if said is None:
        return UNREAD
    same = float(said) == float(reference) if number else normalise(said) == reference
    return ItemScore(score=float(same), parsed=said)


def _choice(question: Question, raw: str, config: ScoringConfig) -> ItemScore:
    upstream = config.upstream
    if upstream and upstream.choice:
        letter = upstream.choice(raw, question.options)
    else:
        letter = read_choice(short_answer(raw), question.options)
    right = letter is not None and letter.lower() == question.answer.strip(" ().").lower()
    return ItemScore(score=float(right), parsed=letter)


def _point(question: Question, raw: str, config: ScoringConfig) -> ItemScore:
    reference = _reference(question, 2)
    found = _only_place(question, raw, 2, config)
    if found is None:
        return UNREAD
    error = math.dist(found, reference)
    return ItemScore(score=float(error <= config.protocol.point_radius), parsed=_show(found), error=error)


def _only_place(question: Question, raw: str, count: int, config: ScoringConfig) -> tuple[float, ...] | None:
    """Return the one point or box of an answer; None for several different ones or one outside."""
    found = set(read_numbers(short_answer(raw), count, config.coordinates, picture_size(question, config)))
    place = found.pop() if len(found) == 1 else None
    return place if place is not None and inside(place) else None


def _points(question: Question, raw: str, config: ScoringConfig) -> ItemScore:
    """Return the fraction of the points on the mask; a point outside the image is a miss."""
    if question.mask is None:
        raise BlmError(f"question '{question.id}' asks for points but has no mask")
    grey: ImageArray = load_pixels(question.mask, config.root)[..., 0]
    height, width = grey.shape
    upstream = config.upstream
    if upstream and upstream.points and upstream.mask:
        pixels = upstream.points(raw, width, height)
        shown = "; ".join(_show(pixel) for pixel in pixels[:20])
        share = mean_mask_value(pixels, upstream.mask(grey))
        return ItemScore(score=share, parsed=shown or None, points=len(pixels))
    found = read_numbers(final_answer(raw), 2, config.coordinates, picture_size(question, config))
    if not found:
        return ItemScore(score=0.0, parsed=None, points=0)
    hits = [inside(place) and _is_white(grey, place) for place in found]
    return ItemScore(score=float(np.mean(hits)), parsed="; ".join(map(_show, found)), points=len(found))


def _is_white(grey: ImageArray, place: Sequence[float]) -> bool:
    """Return whether the pixel at a position in thousandths is white."""
    row, column = (
        min(int(p * side / 1000 + 1e-9), side - 1) for p, side in zip(place[::-1], grey.shape, strict=True)
    )
    return bool(grey[row, column] > 127)


def _box(question: Question, raw: str, config: ScoringConfig) -> ItemScore:
    reference = _reference(question, 4)
    found = _only_place(question, raw, 4, config)
    if found is None or found[0] >= found[2] or found[1] >= found[3]:
        return UNREAD
    right = overlap(found, reference) >= config.protocol.box_overlap
    return ItemScore(score=float(right), parsed=_show(found))


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection over union of two boxes (x1, y1, x2, y2)."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - shared
    return shared / union if union > 0 else 0.0


def _metric(question: Question, raw: str, config: ScoringConfig) -> ItemScore:
    reference = read_metric(question.answer)
    found = read_metric(short_answer(raw))
    if reference is None:
        raise BlmError(f"question '{question.id}': the reference {question.answer!r} is not a length in cm")
    if found is None or len(found) != len(reference):
        return UNREAD
    error = math.dist(found, reference)
    return ItemScore(
        score=float(error <= config.protocol.metric_radius), parsed=f"{_show(found)} cm", error=error
    )


def _facts(question: Question, raw: str, config: ScoringConfig) -> ItemScore:
    if question.facts is None:
        raise BlmError(f"question '{question.id}' is scored by facts but has no key facts")
    text = final_answer(raw)
    checked = check_facts(text, question.facts)
    return ItemScore(score=float(checked.right), parsed=text or None, facts=checked)


def _judge(question: Question, raw: str, config: ScoringConfig) -> ItemScore:
    return ItemScore(score=0.0, parsed=final_answer(raw) or None)


def _reference(question: Question, count: int) -> tuple[float, ...]:
    found = read_numbers(question.answer, count)
    if not found:
        raise BlmError(
            f"question '{question.id}': the reference {question.answer!r} is not a {question.scorer}"
        )
    return found[0]


def picture_size(question: Question, config: ScoringConfig) -> tuple[int, int] | None:
    """Return width and height of the picture that pixels count in, if coordinates depend on it: the
    question's last image (or the mask, which has its size), by the convention as it is, or as the
    model's processor resized it."""
    convention = config.coordinates
    if convention.kind != "pixels" or convention.size:
        return None
    pictures = [image for message in question.messages for image in message.images]
    pictures = pictures or ([question.mask] if question.mask is not None else [])
    if not pictures:
        raise BlmError(
            f"question '{question.id}' has no image that gives the size in pixels; use pixels:WIDTHxHEIGHT"
        )
    height, width = load_pixels(pictures[-1], config.root).shape[:2]
    if convention.frame == "original":
        return width, height
    if convention.frame == "qwen2_5_vl":
        return qwen2_5_vl_size(width, height)
    if config.resize is None:
        raise BlmError("pixels as the model saw them need its processor; this model does not say its sizes")
    return config.resize(width, height)


def qwen2_5_vl_size(width: int, height: int) -> tuple[int, int]:
    """Return width and height to which Qwen2.5-VL's processor resizes a picture with the limits that
    its authors publish: sides that are multiples of 28, 3,136 to 12,845,056 pixels."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rows, columns = smart_resize(height, width, factor=28, min_pixels=3136, max_pixels=12845056)
    return columns, rows


def _show(values: Sequence[float]) -> str:
    text = ", ".join(f"{value:g}" for value in values)
    return text if len(values) == 1 else f"({text})"


_SCORERS: dict[Scorer, Callable[[Question, str, ScoringConfig], ItemScore]] = {
    "exact": _exact,
    "choice": _choice,
    "point": _point,
    "points": _points,
    "box": _box,
    "metric": _metric,
    "facts": _facts,
    "judge": _judge,
}
