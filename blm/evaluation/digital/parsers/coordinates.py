"""Coordinates in an answer: points and boxes. The caller names the convention.

Four are in use, and numbers alone do not distinguish them: integers 0..1000 of each side (ours,
Qwen3-VL), floats 0..1 (RoboPoint, Where2Place), pixels of the image as the model saw it
(Qwen2.5-VL, RoboBrain 2.0), and y before x on 0..1000 (Gemini). All become thousandths of the
image's width and height, y down.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from blm.evaluation.digital.parsers.places import Group, find_groups
from blm.evaluation.digital.parsers.quantities import read_metric
from blm.types import BlmError

__all__ = ["THOUSANDTHS", "Coordinates", "inside", "read_metric", "read_numbers"]

_SCALES = {"percent": 10.0, "loc": 1000.0 / 1024.0, "bins": 1.0}
"""Thousandths per unit of a scale that the answer states itself."""


Frame = Literal["seen", "original", "qwen2_5_vl"]
"""A picture as the model saw it, after its processor resized it; as its file has it; as Qwen2.5-VL sees
it by default."""


@dataclass(frozen=True)
class Coordinates:
    """The convention in which a model writes coordinates."""

    kind: Literal["thousandths", "unit", "pixels", "yx1000"]
    size: tuple[int, int] | None = None
    """Width and height of the image that pixels refer to; None: that of `frame`."""
    frame: Frame = "seen"
    """The picture that pixels count in, if `size` does not say it."""

    @classmethod
    def parse(cls, text: str) -> Coordinates:
        """Read 'thousandths', 'unit', 'yx1000', 'pixels', 'pixels:original', 'pixels:qwen2_5_vl' or
        'pixels:WIDTHxHEIGHT'; raises BlmError."""
        found = re.fullmatch(r"pixels:(\d+)x(\d+)", text)
        if found and min(int(found[1]), int(found[2])) > 0:
            return cls("pixels", (int(found[1]), int(found[2])))
        if text in ("pixels:original", "pixels:qwen2_5_vl"):
            return cls("pixels", frame="original" if text == "pixels:original" else "qwen2_5_vl")
        if text not in ("thousandths", "unit", "pixels", "yx1000"):
            raise BlmError(
                f"coordinates '{text}' are unknown; valid: thousandths (integers 0..1000), unit (0..1), "
                "yx1000 (y first), pixels (of the picture as the model saw it), pixels:original (as its file "
                "has it), pixels:qwen2_5_vl (as Qwen2.5-VL resizes it) or pixels:WIDTHxHEIGHT"
            )
        return cls(text)  # type: ignore[arg-type]

    def to_thousandths(
        self, numbers: Sequence[str], size: tuple[int, int] | None, *, named: bool = False
    ) -> tuple[float, ...] | None:
        """Return x, y, .. in thousandths of the sides; None for numbers of another convention.

        `size` is that of the image that pixels count in; `named` coordinates are in the order x, y in any
        convention. Decimals up to 1 are shares of the sides where thousandths are expected, because
        nobody writes thousandths of a thousandth.
        """
        values = [float(number) for number in numbers]
        if self.kind == "yx1000" and not named:
            values = [value for y, x in zip(values[::2], values[1::2], strict=True) for value in (x, y)]
        scale = (1.0, 1.0)
        if self.kind in ("thousandths", "yx1000"):
            shares = all(0 <= value <= 1 for value in values)
            if not shares and any(0 < abs(value) < 1 for value in values):
                return None
            if shares and any("." in number for number in numbers):
                scale = (1000.0, 1000.0)
        elif self.kind == "unit":
            if not all(-1 <= value <= 2 for value in values):
                return None
            scale = (1000.0, 1000.0)
        else:
            width, height = self.size or size or (0, 0)
            assert width and height, "pixels need the size of an image"
            scale = (1000.0 / width, 1000.0 / height)
        return tuple(value * scale[index % 2] for index, value in enumerate(values))


THOUSANDTHS = Coordinates("thousandths")


def read_numbers(
    text: str, count: int, coordinates: Coordinates = THOUSANDTHS, size: tuple[int, int] | None = None
) -> list[tuple[float, ...]]:
    """Read all groups of `count` coordinates (2 or 4), in thousandths; see places.py for the forms.

    Percent, Molmo's tags and PaliGemma's tokens state their scale themselves.
    """
    places = [_place(group, coordinates, size) for group in find_groups(text, count)]
    return [place for place in places if place is not None]


def _place(group: Group, coordinates: Coordinates, size: tuple[int, int] | None) -> tuple[float, ...] | None:
    if group.scale == "stated":
        return coordinates.to_thousandths(group.numbers, size, named=group.order == "named")
    scale = _SCALES[group.scale]
    return tuple(round(float(number) * scale, 6) for number in group.numbers)


def inside(place: Sequence[float]) -> bool:
    """Return whether coordinates in thousandths lie in the image."""
    return all(0 <= value <= 1000 for value in place)
