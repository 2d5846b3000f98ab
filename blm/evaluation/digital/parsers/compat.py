"""The upstream benchmarks' own answer parsers, bugs included, to reproduce published numbers.

Each reproduces the behaviour of one public function at one commit, re-implemented from that
behaviour. They see the raw answer: none of them removes a reasoning block. `COMPAT` names them for
`--compat`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from blm.types import FloatArray, ImageArray

Pixels = list[tuple[float, float]]
"""Points as (x, y) in pixels of the mask."""
LETTERS = "ABCDEFGH"


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """The parsers of one upstream evaluation; None if it has no such parser."""

    source: str
    """Repository, file and commit."""
    choice: Callable[[str, Sequence[str]], str | None] | None = None
    """Answer and option texts -> letter."""
    points: Callable[[str, int, int], Pixels] | None = None
    """Answer, width and height of the mask [px] -> points."""
    mask: Callable[[ImageArray], FloatArray] | None = None
    """Grey mask 0..255 -> score of a point on each pixel."""
    rating: Callable[[str], float | None] | None = None
    """Reply of the judge -> score."""


def cosmos_letter(text: str, options: Sequence[str] = ()) -> str | None:
    """Cosmos-Reason1, letter mode: the first capital letter of the text, even inside a word."""
    found = re.search("[A-Z]", text)
    return found[0] if found else None


def cosmos_reasoning(text: str, options: Sequence[str] = ()) -> str | None:
    """Cosmos-Reason1, reasoning mode: the first capital inside the first closed <answer> tag."""
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return cosmos_letter(found[1]) if found else None


_PHRASES = (
    *("the answer is", "answer is", "the correct answer is", "correct answer is"),
    *("the best answer is", "best answer is", "the correct option is", "correct option is"),
    *("the best option is", "best option is", "the choice is", "choice is"),
    *("the correct choice is", "correct choice is", "i choose", "i select", "i pick"),
    *("my answer is", "my choice is", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def lmms_eval_mcq(text: str, options: Sequence[str] = ()) -> str | None:
    """lmms-eval's shared extractor, first version: the best-ranked letter, the last of equals.

    Ranks: start 10, end 9, anywhere after an answer phrase 7, "(B)" 6, "B." 5, "B:" 4, "B)" 3, "B "
    2; if none applies, any letter. Letters inside words count for all but start and end.
    """
    letters = LETTERS[: len(options)] if options else LETTERS
    plain = text.strip()
    if not plain:
        return None
    for sign in ",.!?;:'\"":
        plain = plain.strip(sign)
    padded, bare = f" {plain} ", plain.strip()
    lower = padded.lower()
    after = [lower.find(phrase) + len(phrase) for phrase in _PHRASES if phrase in lower]
    found: list[tuple[int, int, str]] = []
    for letter in letters:
        forms = (
            (6, f"({letter})"),
            (5, f"{letter}."),
            (4, f"{letter}:"),
            (3, f"{letter})"),
            (2, f"{letter} "),
        )
        found += [(rank, padded.rfind(form), letter) for rank, form in forms if form in padded]
        places = [padded.find(letter, start) for start in after]
        found += [(7, place, letter) for place in places if place >= 0]
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((10, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((9, len(padded) - 1, letter))
    found = found or [(0, padded.rfind(letter), letter) for letter in letters if letter in padded]
    return max(found, key=lambda entry: entry[:2])[2] if found else None


_VLM_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def vlmevalkit_can_infer(text: str, options: Sequence[str] = ()) -> str | None:
    """VLMEvalKit's `can_infer`, without its language-model fallback and with VERBOSE unset.

    A letter that is the only option among the words, and among the last four, counts (even the
    article "A"); then "answer is X"; then the only option whose text is contained. A refusal is
    parsed as Z.
    """
    letters = {chr(ord("A") + index): option.lower() for index, option in enumerate(options)}
    letters = letters or dict.fromkeys("ABCD", "")
    if any(refusal in text for refusal in _VLM_REFUSALS):
        return "Z"
    if "Failed to obtain answer via API" not in text:
        words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
        present = [letter for letter in letters if letter in words]
        if len(present) == 1 and words.index(present[0]) > len(words) - 5:
            return present[0]
        if not present and "Z" in words:
            return "Z"
        said = re.search(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", text)
        if said and said[1].upper() in letters:
            return said[1].upper()
    lower = text.lower()
    if len(lower) > 2 * sum(map(len, letters.values())):
        return None
    inside = [letter for letter, option in letters.items() if option in lower]
    return inside[0] if len(inside) == 1 else None


def egothink_rating(text: str) -> float | None:
    """EgoThink's judge: the first [[number]], else the first [number], a citation mark included."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    return float(found[1]) if found else None


def _tuples(text: str) -> list[list[str]]:
    """Return number tuples in round brackets, as all three point parsers find them."""
    found = re.findall(r"\(([-+]?\d+\.?\d*(?:,\s*[-+]?\d+\.?\d*)*?)\)", text)
    return [entry.split(",") for entry in found]


def lmms_eval_points(text: str, width: int, height: int) -> Pixels:
    """lmms-eval, Where2Place and RefSpatial: every pair, even of integers, is in 0..1; no boxes."""
    pairs = [(float(entry[0]), float(entry[1])) for entry in _tuples(text) if len(entry) == 2]
    return [(int(x * width), int(y * height)) for x, y in pairs]


def flagevalmm_points(text: str, width: int, height: int) -> Pixels:
    """FlagEvalMM, Where2Place: only the last line; a pair with a "." is 0..1, others are pixels.

    A box stands for all pixels in it.
    """
    return _mixed_points(text.split("\n")[-1], width, height, inside=True)


def roborefer_points(text: str, width: int, height: int) -> Pixels:
    """RoboRefer, RefSpatial-Bench: a pair with a "." is 0..1, else pixels; a box is always 0..1."""
    return _mixed_points(text, width, height, inside=False)


def _mixed_points(text: str, width: int, height: int, *, inside: bool) -> Pixels:
    """Read points and boxes; `inside` cuts boxes at the image's sides.

    A box with negative extent is empty (upstream: the row is dropped).
    """
    points: Pixels = []
    for entry in (found for found in _tuples(text) if len(found) in (2, 4)):
        values = [float(number) for number in entry]
        sides = (width, height) * (len(values) // 2)
        relative = any("." in number for number in entry)
        if len(values) == 4:
            relative = "." in entry[0] or not inside
        if relative:
            values = [int(value * side) for value, side in zip(values, sides, strict=True)]
        if len(values) == 2:
            points.append((values[0], values[1]))
        else:
            x0, y0, x1, y1 = (int(value) for value in values)
            columns, rows = range(x0, x1), range(y0, y1)
            if inside:  # upstream draws the box into an image
                columns, rows = (
                    range(side)[slice(a, b)] for side, a, b in ((width, x0, x1), (height, y0, y1))
                )
            points += [(x, y) for y in rows for x in columns]
    return points


def mean_mask_value(points: Pixels, mask: FloatArray) -> float:
    """Return the mean of the mask [height, width] at the points; 0 outside of it, as upstream."""
    height, width = mask.shape
    found = [mask[int(y), int(x)] if 0 <= x < width and 0 <= y < height else 0.0 for x, y in points]
    return float(np.mean(found)) if found else 0.0


COMPAT: Mapping[str, Upstream] = {
    "cosmos_letter": Upstream(
        source="nvidia-cosmos/cosmos-reason1 examples/benchmark/tools/eval/utils/output.py 3337563",
        choice=cosmos_letter,
    ),
    "cosmos_reasoning": Upstream(
        source="nvidia-cosmos/cosmos-reason1 examples/benchmark/tools/eval/utils/output.py 3337563",
        choice=cosmos_reasoning,
    ),
    "lmms_eval": Upstream(
        source="EvolvingLMMs-Lab/lmms-eval lmms_eval/tasks/_task_utils/mcq_extract.py c228e27 (later "
        "rewritten), lmms_eval/tasks/where2place/utils.py 205d72d",
        choice=lmms_eval_mcq,
        points=lmms_eval_points,
        mask=lambda grey: np.round(grey / 255.0),
    ),
    "vlmevalkit": Upstream(
        source="open-compass/VLMEvalKit vlmeval/utils/matching_util.py d21c5e9",
        choice=vlmevalkit_can_infer,
    ),
    "egothink": Upstream(source="AdaCheng/EgoThink common.py 0b9c37e", rating=egothink_rating),
    "flagevalmm": Upstream(
        source="flageval-baai/FlagEvalMM tasks/where2place/evaluate.py 07471c0",
        points=flagevalmm_points,
        mask=lambda grey: grey / 255.0,
    ),
    "roborefer": Upstream(
        source="Zhoues/RoboRefer Evaluation/summarize_acc.py (2025-06)",
        points=roborefer_points,
        mask=lambda grey: (grey > 0).astype(np.float64),
    ),
}
"""Name -> upstream evaluation."""
