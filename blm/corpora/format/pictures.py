"""Look at the media of a corpus once: size and perceptual hash of each picture, or what is wrong with it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import PIL.Image

from blm.corpora.format.faults import RowError
from blm.media import MAX_PIXELS, VIDEOS, load_pixels, locate, read_frames, split_time, video_seconds
from blm.types import BlmError, Image, ImageArray

SIDE = 16
"""A hash has SIDE * SIDE bits: whether the picture gets lighter from one cell to the next on its right."""
STEP = 2
"""By more than so many grey levels of 255, so that the noise of a codec on a plain area does not count."""
COLOURS = 4
"""Beside the bits stand the mean colours of COLOURS * COLOURS cells: plain areas have no bits to differ."""
COLOUR_STEP = 4
"""Equal pictures differ by at most so many levels in each."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class Look:
    """What one picture looks like."""

    size: int
    """Width * height [px]."""
    bits: int
    """Difference hash."""
    colours: bytes

    def near(self, other: Look, distance: int) -> bool:
        """Whether at most `distance` bits differ, and the colours are about the same."""
        if (self.bits ^ other.bits).bit_count() > distance:
            return False
        mine, theirs = (np.frombuffer(look.colours, np.uint8).astype(int) for look in (self, other))
        return bool(np.abs(mine - theirs).max() <= COLOUR_STEP)


def look_at(pixels: ImageArray) -> Look:
    """Return the look of a picture [height, width, 3]."""
    picture = PIL.Image.fromarray(pixels)
    grey = np.asarray(picture.convert("L").resize((SIDE + 1, SIDE), PIL.Image.Resampling.BOX)).astype(int)
    bits = np.packbits(np.diff(grey, axis=1) > STEP)
    colours = picture.resize((COLOURS, COLOURS), PIL.Image.Resampling.BOX)
    return Look(pixels.shape[0] * pixels.shape[1], int.from_bytes(bits.tobytes(), "big"), colours.tobytes())


class Gallery:
    """The media below one folder; each is decoded once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._seen: dict[str, Look | RowError] = {}

    def looks(self, images: Sequence[Image]) -> tuple[Look, ...]:
        """Return the look of each picture, in order. Raises RowError for the first that is at fault."""
        new = [str(image.path) for image in images if image.pixels is None]
        new = [reference for reference in dict.fromkeys(new) if reference not in self._seen]
        for file, references in groupby(new, lambda reference: split_time(reference)[0]):
            self._open(file, list(references))  # frames of one video in one pass
        return tuple(self._look(image) for image in images)

    def _look(self, image: Image) -> Look:
        if image.pixels is not None:
            return look_at(load_pixels(image))
        found = self._seen[str(image.path)]
        if isinstance(found, RowError):
            raise RowError(found.reason, found.detail)
        return found

    def _open(self, file: str, references: list[str]) -> None:
        try:
            path = find_media(file, self.root)
            times = [split_time(reference)[1] for reference in references]
            late = [reference for reference, time in zip(references, times, strict=True) if time is not None]
            if late and (seconds := video_seconds(path)) < max(t for t in times if t is not None):
                raise RowError("time after the end", f"{late[-1]} of {seconds:.3f} s")
            if late and None not in times:
                pictures: Sequence[ImageArray] = read_frames(path, [t for t in times if t is not None])
            else:
                pictures = [load_pixels(Image(path=reference), self.root) for reference in references]
        except RowError as error:
            self._seen |= dict.fromkeys(references, error)
        except BlmError as error:
            self._seen |= dict.fromkeys(references, RowError("media unreadable", str(error)))
        else:
            looks = map(look_at, pictures)
            self._seen |= dict(zip(references, looks, strict=True))


def find_media(reference: str, root: Path) -> Path:
    """Return the file of a reference. Raises RowError when it is outside, missing, or a huge picture."""
    try:
        path = locate(reference, root)
    except BlmError as error:
        raise RowError("media outside the folder", str(error)) from None
    if not path.is_file():
        raise RowError("media missing", reference)
    if path.suffix.lower() not in VIDEOS and (size := _size(path)) > MAX_PIXELS:
        raise RowError("media too large", f"{reference}: {size:,} px")
    return path


def _size(path: Path) -> int:
    """Width * height of a picture, from its header alone; 0 if it has none."""
    try:
        with PIL.Image.open(path) as picture:
            return picture.width * picture.height
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        return PIL.Image.MAX_IMAGE_PIXELS or MAX_PIXELS + 1  # and more
    except (OSError, ValueError, SyntaxError):
        return 0  # decoding names the fault


class NearIndex(Generic[Value]):
    """Finds what was added under an equal key with near pictures, without comparing with everything.

    Hashes within d bits agree in at least one of d + 1 equal parts, so only those are compared.
    """

    def __init__(self, distance: int) -> None:
        if not 0 <= distance < SIDE:
            raise BlmError(f"a hash distance of {distance} bits is outside 0 .. {SIDE - 1}")
        self._distance = distance
        self._places: dict[Hashable, list[tuple[tuple[Look, ...], Value]]] = {}

    def find(self, key: Hashable, looks: tuple[Look, ...]) -> Value | None:
        for place in self._parts(key, looks):
            for others, value in self._places.get(place, ()):
                if all(a.near(b, self._distance) for a, b in zip(looks, others, strict=True)):
                    return value
        return None

    def add(self, key: Hashable, looks: tuple[Look, ...], value: Value) -> None:
        for place in self._parts(key, looks):
            self._places.setdefault(place, []).append((looks, value))

    def _parts(self, key: Hashable, looks: tuple[Look, ...]) -> Iterator[Hashable]:
        if not looks:
            yield key
            return
        width = -(-SIDE * SIDE // (self._distance + 1))
        for part in range(self._distance + 1):
            yield key, len(looks), part, (looks[0].bits >> part * width) & ((1 << width) - 1)
