"""Coordinates in published rows, converted to ours: integers 0..1000 of each side, y down.

Points become "(x, y)" and boxes "(x1, y1, x2, y2)", as in our scene questions, for every backbone.
A row whose coordinates cannot be converted is refused; a literal tag is never trained as an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from blm.corpora.converters.turns import Part, Turn
from blm.corpora.format.faults import RowError

SIDE = 1000
"""Coordinates at the right and the lower end of an image."""
Size = tuple[float, float]
"""Width and height that coordinates refer to."""
_OBJECT = re.compile(r"<(ref-object|bbox|point)>")
_IN_JSON = re.compile(r'":\s*\Z')
"""The end of a text before the value of a JSON field: coordinates are a list there."""
_NAMED = re.compile(r"<ref>(.*?)</ref>", re.DOTALL)
_BOXES = re.compile(r"<box>(.*?)</box>", re.DOTALL)
_NUMBER = r"-?\d+(?:\.\d+)?"
_GROUP = re.compile(rf"[\[(]\s*({_NUMBER}(?:\s*,\s*{_NUMBER})*)\s*[\])]")
_RESERVED = re.compile(r"<\|?(?:object_ref|box|quad|point)_(?:start|end)\|?>|</?(?:quad|points?)\b[^>]*>")
_UNIT = re.compile(r"\(\s*([01]?\.\d+|[01])((?:\s*,\s*(?:[01]?\.\d+|[01]))+)\s*\)")
_UNIT_RULE = re.compile(r"between 0 and 1(?![\d.]\d)")


def coordinates(values: Sequence[float], size: Size) -> str:
    """Return a point (2 values) or a box (4 values) in our form; `size` is that of the image.

    Raises RowError for another number of values, for a box whose corners are not in order, and for
    coordinates outside of the image by more than a pixel or a thousandth.
    """
    if len(values) not in (2, 4) or not all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    ):
        raise RowError("unclear coordinates", f"{list(values)}: a point has 2 numbers, and a box 4")
    sides = (*size, *size)[: len(values)]
    slack = [max(0.001 * side, min(1.0, 0.01 * side)) for side in sides]
    if any(not -extra <= v <= side + extra for v, side, extra in zip(values, sides, slack, strict=True)):
        raise RowError("unclear coordinates", f"{list(values)} are outside of {size[0]:g} x {size[1]:g}")
    if len(values) == 4 and not (values[0] <= values[2] and values[1] <= values[3]):
        raise RowError(
            "unclear coordinates", f"{list(values)}: the first corner of a box is its upper left one"
        )
    found = [min(SIDE, max(0, round(SIDE * value / side))) for value, side in zip(values, sides, strict=True)]
    return f"({', '.join(map(str, found))})"


def fill_objects(turns: Sequence[Turn], objects: Any, sizes: Sequence[Size | None]) -> list[Turn]:
    """Return the turns with names and coordinates for the tags `<ref-object>` and `<bbox>`.

    `objects` is the row's field (ms-swift): lists "ref" and "bbox", "bbox_type" ("real" for pixels,
    or "norm1"), and "image_id" if there are several images. `sizes` are those of the row's images.
    Raises RowError if the numbers of tags and objects differ, and for tags without objects.
    """
    given = read_objects(objects)
    names, places = given.get("ref") or [], given.get("bbox") or given.get("points") or []
    tags = [tag for turn in turns for part in _texts(turn) for tag in _OBJECT.findall(part)]
    if not tags:
        return list(turns)
    wanted = tags.count("ref-object"), len(tags) - tags.count("ref-object")
    if (len(names), len(places)) != wanted and (wanted[0] or len(places) != wanted[1]):
        raise RowError(
            "unclear coordinates",
            f"{wanted[0]} tags <ref-object> and {wanted[1]} tags <bbox> for {len(names)} names and "
            f"{len(places)} boxes",
        )
    written = iter([_written(place, number, given, sizes) for number, place in enumerate(places)])
    called = iter(map(str, names))

    def fill(tag: re.Match[str]) -> str:
        if tag[1] == "ref-object":
            return next(called)
        place = next(written)
        return f"[{place[1:-1]}]" if _IN_JSON.search(tag.string, 0, tag.start()) else place

    return [_mapped(turn, lambda text: _OBJECT.sub(fill, text)) for turn in turns]


def read_objects(objects: Any) -> Mapping[str, Any]:
    """Return the field "objects" with lists "ref" and "bbox"; empty for a row without it.

    ms-swift 2 wrote a list of {"caption", "bbox", "bbox_type", "image"}, also as a JSON text.
    """
    if isinstance(objects, str):
        try:
            objects = json.loads(objects) if objects.strip() else None
        except ValueError:
            raise RowError("unclear coordinates", f"'objects' is {objects[:60]!r}, no JSON") from None
    if isinstance(objects, list) and all(isinstance(one, Mapping) and "bbox" in one for one in objects):
        kinds = {str(one.get("bbox_type") or "real") for one in objects}
        if len(kinds) > 1:
            raise RowError("unclear coordinates", f"'bbox_type' differs: {', '.join(sorted(kinds))}")
        found = {"ref": [one.get("caption", "") for one in objects], "bbox": [one["bbox"] for one in objects]}
        numbers = [one.get("image", 0) for one in objects]
        return {**found, "bbox_type": next(iter(kinds), "real"), "image_id": numbers}
    if objects is not None and not isinstance(objects, Mapping):
        raise RowError("unclear coordinates", f"'objects' is {str(objects)[:60]!r}, no object with 'bbox'")
    given = objects or {}
    if not all(isinstance(given.get(key) or [], list) for key in ("ref", "bbox", "points", "image_id")):
        raise RowError(
            "unclear coordinates", f"'objects' is {str(given)[:60]}; it needs lists 'ref' and 'bbox'"
        )
    return given


def _written(place: Any, number: int, objects: Mapping[str, Any], sizes: Sequence[Size | None]) -> str:
    kind = objects.get("bbox_type") or "real"
    units: dict[str, Size] = {"norm1": (1.0, 1.0), "norm1000": (1000.0, 1000.0)}
    if kind != "real" and kind not in units:
        raise RowError("unclear coordinates", f"'bbox_type' is {kind!r}; valid: real, {', '.join(units)}")
    size = units.get(kind)
    if size is None:
        owners = objects.get("image_id")
        owner = owners[number] if isinstance(owners, list) and number < len(owners) else 0
        if len(sizes) > 1 and owners is None:
            raise RowError("unclear coordinates", f"{len(sizes)} images, and no 'image_id' for the boxes")
        if not isinstance(owner, int) or not 0 <= owner < len(sizes) or (size := sizes[owner]) is None:
            raise RowError("unclear coordinates", f"pixels of image {owner!r}, whose size is not known")
    if not isinstance(place, list | tuple):
        raise RowError("unclear coordinates", f"a box is {str(place)[:60]!r}")
    return coordinates(place, size)


def convert_marks(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns with `<ref>name</ref><box>[[..]]</box>` (InternVL, Qwen-VL) in our form.

    Both write integers 0..1000. Raises RowError for the marks of other models, whose coordinates
    have several meanings.
    """

    def marks(text: str) -> str:
        if found := _RESERVED.search(text):
            raise RowError("unclear coordinates", f"the mark {found[0]!r} of another model")
        text = _BOXES.sub(lambda box: _boxes(box[1]), text)
        return (
            _NAMED.sub(lambda name: f"{name[1].strip()} ", text).replace("  ", " ")
            if _NAMED.search(text)
            else text
        )

    return [_mapped(turn, marks) for turn in turns]


def _boxes(text: str) -> str:
    groups = [[float(number) for number in found.split(",")] for found in _GROUP.findall(text)]
    if len(groups) == 2 and all(len(group) == 2 for group in groups):  # Qwen-VL: (x1,y1),(x2,y2)
        groups = [[*groups[0], *groups[1]]]
    if not groups:
        raise RowError("unclear coordinates", f"<box>{text[:60]}</box>")
    return ", ".join(coordinates(group, (SIDE, SIDE)) for group in groups)


def from_unit(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns with tuples of numbers 0..1 (RoboPoint, RefSpatial) in our form.

    The sentence of a question that asks for numbers between 0 and 1 asks for ours. Only rows whose
    answers have such tuples change.
    """
    answers = [text for turn in turns if turn.role == "assistant" for text in _texts(turn)]
    if not any("." in found[0] for text in answers for found in _UNIT.finditer(text)):
        return list(turns)

    def convert(text: str) -> str:
        return _UNIT.sub(lambda found: _thousandths(found[0]), text)

    asked = [
        _mapped(turn, lambda text: _UNIT_RULE.sub(f"integers between 0 and {SIDE}", text)) for turn in turns
    ]
    return [_mapped(turn, convert) for turn in asked]


def _thousandths(text: str) -> str:
    if "." not in text:  # integers are of another convention
        return text
    values = [float(number) for number in text.strip("()").split(",")]
    if any(value > 1 for value in values):
        raise RowError("unclear coordinates", f"{text}: numbers above 1 beside others of 0..1")
    return f"({', '.join(str(round(SIDE * value)) for value in values)})"


def _texts(turn: Turn) -> list[str]:
    return (
        [turn.content] if isinstance(turn.content, str) else [p for p in turn.content if isinstance(p, str)]
    )


def _mapped(turn: Turn, change: Any) -> Turn:
    """Return a turn with its texts changed."""
    if isinstance(turn.content, str):
        return replace(turn, content=change(turn.content))
    parts: list[Part] = [change(part) if isinstance(part, str) else part for part in turn.content]
    return replace(turn, content=tuple(parts))
