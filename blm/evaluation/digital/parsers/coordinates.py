"""Coordinates and lengths in an answer: points, boxes, distances. The caller names the convention.

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

from blm.types import BlmError

_NUMBER = r"[-+]?\d+(?:\.\d+)?"


@dataclass(frozen=True)
class Coordinates:
    """The convention in which a model writes coordinates."""

    kind: Literal["thousandths", "unit", "pixels", "yx1000"]
    size: tuple[int, int] | None = None
    """Width and height of the image that pixels refer to; None for the question's own."""

    @classmethod
    def parse(cls, text: str) -> Coordinates:
        """Read 'thousandths', 'unit', 'yx1000', 'pixels' or 'pixels:WIDTHxHEIGHT'; raises BlmError."""
        found = re.fullmatch(r"pixels:(\d+)x(\d+)", text)
        if found and min(int(found[1]), int(found[2])) > 0:
            return cls("pixels", (int(found[1]), int(found[2])))
        if text not in ("thousandths", "unit", "pixels", "yx1000"):
            raise BlmError(
                f"coordinates '{text}' are unknown; valid: thousandths (integers 0..1000), unit (0..1), "
                "yx1000 (y first), pixels (of the question's image) or pixels:WIDTHxHEIGHT"
            )
        return cls(text)  # type: ignore[arg-type]

    def to_thousandths(
        self, numbers: Sequence[str], size: tuple[int, int] | None
    ) -> tuple[float, ...] | None:
        """Return x, y, .. in thousandths of the sides; None for numbers of another convention.

        `size` is that of the question's image.
        """
        values = [float(number) for number in numbers]
        if self.kind == "yx1000":
            values = [value for y, x in zip(values[::2], values[1::2], strict=True) for value in (x, y)]
        if self.kind in ("thousandths", "yx1000") and not all("." not in number for number in numbers):
            return None
        if self.kind == "unit" and not all(-1 <= value <= 2 for value in values):
            return None
        scale = (1.0, 1.0)
        if self.kind == "unit":
            scale = (1000.0, 1000.0)
        elif self.kind == "pixels":
            width, height = self.size or size or (0, 0)
            assert width and height, "pixels need the size of an image"
            scale = (1000.0 / width, 1000.0 / height)
        return tuple(value * scale[index % 2] for index, value in enumerate(values))


THOUSANDTHS = Coordinates("thousandths")


def read_numbers(
    text: str, count: int, coordinates: Coordinates = THOUSANDTHS, size: tuple[int, int] | None = None
) -> list[tuple[float, ...]]:
    """Read all groups of `count` coordinates, in thousandths.

    Forms are "(x, y)", "[x, y]" and Molmo's <point x= y=>.
    """
    number = rf"\s*({_NUMBER})\s*"
    groups = re.findall(r"[(\[]" + ",".join([number] * count) + r"[)\]]", text)
    if count == 2 and not groups:
        tags = re.findall(rf'\bx\d*="({_NUMBER})"\s+y\d*="({_NUMBER})"', text)  # always percent
        return [tuple(round(float(number) * 10, 6) for number in tag) for tag in tags]
    places = [coordinates.to_thousandths(group, size) for group in groups]
    return [place for place in places if place is not None]


def inside(place: Sequence[float]) -> bool:
    """Return whether coordinates in thousandths lie in the image."""
    return all(0 <= value <= 1000 for value in place)


def read_metric(text: str) -> tuple[float, ...] | None:
    """Read a length or vector in cm: "12 cm", "0.12 m", "(12, -3, 20) cm"; the default unit is cm.

    None for several different ones. Vectors take precedence over lengths, lengths with a unit over
    bare numbers.
    """
    unit = r"\s*(mm|cm|m|(?:milli|centi)?met(?:er|re)s?)\b"
    vector = rf"[(\[]\s*({_NUMBER}(?:\s*,\s*{_NUMBER})+)\s*[)\]](?:{unit})?"
    found = re.findall(vector, text) or re.findall(rf"(?<![\w.,(\[])({_NUMBER}){unit}", text)
    found = found or [(number, "cm") for number in re.findall(rf"(?<![\w.])({_NUMBER})(?![\w.]*\w)", text)]
    scales = {"": 1.0, "c": 1.0, "mm": 0.1, "mi": 0.1, "m": 100.0, "me": 100.0}
    values = set()
    for numbers, name in found:
        scale = scales[name[:1] if name.startswith("c") else name[:2]]
        values.add(tuple(round(float(number) * scale, 6) for number in numbers.split(",")))
    return values.pop() if len(values) == 1 else None
