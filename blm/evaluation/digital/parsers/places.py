"""Finding the groups of coordinates in an answer: points of two numbers, boxes of four.

Forms, the first that is found counts: Molmo's tags (always percent), PaliGemma's <loc> tokens
(y first, 1024ths), JSON objects, named numbers ("x=350, y=620"), brackets, a bare group on a line
of its own. Qwen2-VL's and other models' reference texts are left out, so that "cup 2" is no
coordinate. Ratios (3:4, 1/2), sizes (640x480) and single numbers are no coordinates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from blm.evaluation.digital.parsers.phrases import after_correction
from blm.evaluation.digital.parsers.text import fenced, parse_json, plain

Scale = Literal["stated", "percent", "loc", "bins"]
"""The caller's convention, percent, PaliGemma's 1024ths or Florence-2's thousandths."""


@dataclass(frozen=True)
class Group:
    """The numbers of one point or box as written; PaliGemma's are in the order x, y."""

    numbers: tuple[str, ...]
    scale: Scale = "stated"
    order: Literal["written", "named"] = "written"
    """named: x comes first because the names say so, whatever the convention."""


_NUMBER = r"[-+]?(?:\d++(?:\.\d++)?|\.\d++)"
_SIGNED = rf"(?<![\w/:.])({_NUMBER})\s*(%?)(?![\w/:]|\.\d)"
_REFERENCE = re.compile(
    r"<\|object_ref_start\|>.*?<\|object_ref_end\|>|<ref>.*?</ref>|<\|ref\|>.*?<\|/ref\|>", re.DOTALL
)
_TOKEN = re.compile(
    r"<\|/?(?:box|quad|det|point)(?:_start|_end)?\|>|</?(?:box|bbox|det|point|quad|bounding_box)>"
)
_MOLMO = re.compile(r"<points?\s[^>]*>")
_MOLMO_PAIR = re.compile(rf"\bx\d*=[\"']?({_NUMBER})[\"']?\s+y\d*=[\"']?({_NUMBER})")
_LOC = re.compile(r"<loc(_?)(\d{1,4})>")
_FROM_EDGES = re.compile(
    rf"(?<!\d)({_NUMBER})\s?(%)\s+(?:from the left|across|of the width)\b.*?"
    rf"(?<!\d)({_NUMBER})\s?(%)\s+(?:from the top|down|of the height)\b",
    re.DOTALL | re.IGNORECASE,
)
_SEPARATOR = r"(?:\s*[,;、]\s*|\s+)"
_BARE_LEAD = (
    r"\W*?(?:\d+[.)]\s+)?(?:.*\b(?:at|is|are)\b[\s:]*"
    r"|(?:the )?(?:point|coordinates?|position|location|cent(?:er|re)|(?:bounding )?box|xyxy)"
    r"\s*\d*\s*[:=]\s*)?"
)
_DENIED = re.compile(
    r"(?:\b(?:not|nicht|no|pas)|n['’]t)(?:\s+(?:be|at|in|the|point|box))*\s*$", re.IGNORECASE
)
_BETWEEN_CORNERS = re.compile(
    r"(?:[\s,;:–—-]|\b(?:and|to|the|(?:bottom|lower)[- ]right|corner|is|at)\b)*", re.IGNORECASE
)
_LISTS = (
    "point_2d", "points_2d", "point", "points", "bbox_2d", "bbox", "box_2d", "box", "boxes", "bounding_box",
    "coordinates", "coordinate", "position", "location", "objects",
)  # fmt: skip
"""Fields of a JSON object that hold coordinates."""
_NAMES: dict[int, tuple[tuple[str, ...], ...]] = {
    2: (("x", "y"),),
    4: (
        ("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax"), ("x_min", "y_min", "x_max", "y_max"),
        ("x0", "y0", "x1", "y1"), ("left", "top", "right", "bottom"),
    ),
}  # fmt: skip
"""Number of coordinates -> the names that they have in JSON objects and in text."""
_SIZES = (("x", "y", "width", "height"), ("x", "y", "w", "h"), ("left", "top", "width", "height"))
"""Corner and size of a box."""
_CORNERS = ("top_left", "bottom_right")


def find_groups(text: str, count: int) -> list[Group]:
    """Return the groups of `count` coordinates in a final answer, 2 or 4, in their order."""
    said = _TOKEN.sub("\n", _REFERENCE.sub(" ", after_correction(re.sub("[−‐‑]", "-", text))))
    said = re.sub(r"\\(?:left|right)(?![a-z])", "", said).strip()
    for find in _FINDERS:
        if groups := list(find(said, count)):
            return groups
    return []


def _molmo(text: str, count: int) -> Iterator[Group]:
    if count == 2:
        for tag in _MOLMO.findall(text):
            yield from (Group(pair, "percent") for pair in _MOLMO_PAIR.findall(tag))


def _paligemma(text: str, count: int) -> Iterator[Group]:
    """Yield PaliGemma's y, x in 1024ths and Florence-2's x, y in thousandths (<loc_123>)."""
    tokens = _LOC.findall(text)
    for start in range(0, len(tokens) if len(tokens) % count == 0 else 0, count):
        florence = {mark for mark, _ in tokens[start : start + count]} == {"_"}
        numbers = [number for _, number in tokens[start : start + count]]
        swapped = [number for y, x in zip(numbers[::2], numbers[1::2], strict=True) for number in (x, y)]
        yield Group(tuple(numbers if florence else swapped), "bins" if florence else "loc", "named")


def _json(text: str, count: int) -> Iterator[Group]:
    value = parse_json(fenced(text))
    if isinstance(value, dict | list):
        yield from _walk(value, count)


def _walk(value: Any, count: int) -> Iterator[Group]:
    """Yield the groups in a JSON value: lists of numbers, pairs of corners, objects with names."""
    if isinstance(value, list):
        flat = value
        if count == 4 and len(value) == 2 and all(isinstance(c, list) and len(c) == 2 for c in value):
            flat = [number for corner in value for number in corner]
        if len(flat) == count and all(map(_is_number, flat)):
            yield Group(tuple(_written(number) for number in flat))
        else:
            for part in value:
                yield from _walk(part, count)
    elif isinstance(value, dict):
        fields = {str(name).lower(): content for name, content in value.items()}
        if (named := _named_fields(fields, count)) is not None:
            yield named
        elif count == 4 and all(name in fields for name in _CORNERS):
            yield from _walk([fields[name] for name in _CORNERS], count)
        else:
            for name in (name for name in _LISTS if name in fields):
                yield from _walk(fields[name], count)
    elif isinstance(value, str):
        yield from list(_bracketed(value, count)) or _bare(value, count)


def _named_fields(fields: dict[str, Any], count: int) -> Group | None:
    for names in _NAMES[count]:
        if all(_is_number(fields.get(name)) for name in names):
            if count == 2 and any(name in fields for size in _SIZES for name in size[2:]):
                return None  # a box
            return Group(tuple(_written(fields[name]) for name in names), order="named")
    for names in _SIZES if count == 4 else ():
        if all(_is_number(fields.get(name)) for name in names):
            x, y, width, height = (float(fields[name]) for name in names)
            return Group(tuple(_written(v) for v in (x, y, x + width, y + height)), order="named")
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _written(value: float) -> str:
    return repr(value)  # a float keeps its point, an integer has none


def _named(text: str, count: int) -> Iterator[Group]:
    """Yield numbers with their names in text, as in "x=350, y=620" and "35% from the left, ..".."""
    for found in _FROM_EDGES.finditer(text) if count == 2 else ():
        yield from _group(found, "named")
    for names in _NAMES[count]:
        pattern = r"(?:[\s,;\"'}]|</?|\band\b)*".join(
            rf"\b{name}[\"']?\s*[=:>]\s*[\"']?({_NUMBER})\s*(%?)[\"']?(?![\w])(?:</{name}>)?"
            for name in names
        )
        for found in re.finditer(pattern, text, re.IGNORECASE):
            if not _DENIED.search(text[: found.start()]):
                yield from _group(found, "named")


def _bracketed(text: str, count: int) -> Iterator[Group]:
    """Yield the groups in brackets; two pairs next to each other, and no others, are a box."""
    found = _in_brackets(text, count)
    if not found and count == 4:
        found = [box for line in text.splitlines() for box in _corners(line)] or _corners(text)
    for match in found:
        yield from _group(match)


def _in_brackets(text: str, count: int) -> list[re.Match[str]]:
    pattern = rf"[(\[<{{]\s*{_SEPARATOR.join([_SIGNED] * count)}\s*[)\]>}}]"
    return [found for found in re.finditer(pattern, text) if not _DENIED.search(text[: found.start()])]


def _corners(text: str) -> list[re.Match[str]]:
    """Return the box whose corners are the only two pairs in a text."""
    pairs = _in_brackets(text, 2)
    if len(pairs) != 2 or not _BETWEEN_CORNERS.fullmatch(text[pairs[0].end() : pairs[1].start()]):
        return []
    pair = rf"[(\[<{{]\s*{_SIGNED}{_SEPARATOR}{_SIGNED}\s*[)\]>}}]"
    return list(re.finditer(rf"{pair}.*?{pair}", text, re.DOTALL))


def _bare(text: str, count: int) -> Iterator[Group]:
    """Yield the groups that are a line of their own, or its end after "at", "is" or "point:"."""
    numbers = _SEPARATOR.join([_SIGNED] * count)
    for line in plain(text).splitlines():
        found = re.fullmatch(rf"{_BARE_LEAD}{numbers}\s*[.;]?\s*", line, re.IGNORECASE)
        if found and not _DENIED.search(line[: found.start(1)]):
            yield from _group(found)


def _group(found: re.Match[str], order: Literal["written", "named"] = "written") -> Iterator[Group]:
    """Yield the group of a match of alternating numbers and percent signs; none if these differ."""
    numbers, signs = found.groups()[::2], set(found.groups()[1::2])
    if len(signs) == 1:
        yield Group(numbers, "percent" if signs == {"%"} else "stated", order)


_FINDERS: tuple[Callable[[str, int], Iterator[Group]], ...] = (
    _molmo,
    _paligemma,
    _json,
    _named,
    _bracketed,
    _bare,
)
