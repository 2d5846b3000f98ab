"""Perceptual hashes of images, and an index that finds near-duplicates.

The hash is a difference hash (dHash; N. Krawetz, "Kind of Like That", 2013) of 16 x 16 bits with a
dead band against codec noise, extended by the mean colours of 4 x 4 cells. The package `imagehash`
has a dHash without dead band and colours, which gives other numbers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import PIL.Image

from blm.corpora.format.faults import RowError
from blm.corpora.format.find_media import read_references
from blm.media import load_pixels, split_time
from blm.types import BlmError, Image, ImageArray

SIDE = 16
"""A hash has SIDE * SIDE bits: whether a cell's right neighbour is brighter than the cell."""
STEP = 2
"""Minimum brightness difference that sets a bit [levels of 255]; smaller ones are codec noise."""
COLOURS = 4
"""Mean colours are stored for COLOURS * COLOURS cells, because plain areas set no bits."""
COLOUR_STEP = 4
"""Maximum difference of each mean colour between near-duplicates [levels of 255]."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class PictureHash:
    """The perceptual hash of one image."""

    size: int
    """Width * height [px]."""
    bits: int
    """Difference hash of SIDE * SIDE bits."""
    colours: bytes
    """Mean colours, uint8 [COLOURS, COLOURS, 3] as bytes."""

    def near(self, other: PictureHash, distance: int) -> bool:
        """Whether at most `distance` bits differ and the mean colours are similar."""
        if (self.bits ^ other.bits).bit_count() > distance:
            return False
        mine, theirs = (np.frombuffer(one.colours, np.uint8).astype(int) for one in (self, other))
        return bool(np.abs(mine - theirs).max() <= COLOUR_STEP)


def perceptual_hash(pixels: ImageArray) -> PictureHash:
    """Return the perceptual hash of an RGB image, uint8 [height, width, 3]."""
    picture = PIL.Image.fromarray(pixels)
    grey = np.asarray(picture.convert("L").resize((SIDE + 1, SIDE), PIL.Image.Resampling.BOX)).astype(int)
    bits = np.packbits(np.diff(grey, axis=1) > STEP)
    colours = picture.resize((COLOURS, COLOURS), PIL.Image.Resampling.BOX)
    return PictureHash(
        pixels.shape[0] * pixels.shape[1], int.from_bytes(bits.tobytes(), "big"), colours.tobytes()
    )


class MediaHasher:
    """Hashes the media below one folder; each file is decoded once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._seen: dict[str, PictureHash | RowError] = {}

    def hashes(self, images: Sequence[Image]) -> tuple[PictureHash, ...]:
        """Return the hash of each image, in order. Raises RowError for the first faulty one."""
        new = [str(image.path) for image in images if image.pixels is None]
        new = [reference for reference in dict.fromkeys(new) if reference not in self._seen]
        for file, references in groupby(new, lambda reference: split_time(reference)[0]):
            self._open(file, list(references))  # frames of one video in one pass
        return tuple(self._hash(image) for image in images)

    def _hash(self, image: Image) -> PictureHash:
        if image.pixels is not None:
            return perceptual_hash(load_pixels(image))
        found = self._seen[str(image.path)]
        if isinstance(found, RowError):
            raise RowError(found.reason, found.detail)
        return found

    def _open(self, file: str, references: list[str]) -> None:
        for reference, found in read_references(file, references, self.root).items():
            self._seen[reference] = found if isinstance(found, RowError) else perceptual_hash(found)


class NearDuplicateIndex(Generic[Value]):
    """Finds values that were added under an equal key with near-duplicate images.

    Two hashes that differ in at most d bits agree in at least one of d + 1 equal parts (pigeonhole
    principle), so only entries that share a part are compared.
    """

    def __init__(self, distance: int) -> None:
        if not 0 <= distance < SIDE:
            raise BlmError(f"a hash distance of {distance} bits is outside 0 .. {SIDE - 1}")
        self._distance = distance
        self._places: dict[Hashable, list[tuple[tuple[PictureHash, ...], Value]]] = {}

    def find(self, key: Hashable, hashes: tuple[PictureHash, ...]) -> Value | None:
        """Return the value of the first near-duplicate, or None."""
        for place in self._parts(key, hashes):
            for others, value in self._places.get(place, ()):
                if all(a.near(b, self._distance) for a, b in zip(hashes, others, strict=True)):
                    return value
        return None

    def add(self, key: Hashable, hashes: tuple[PictureHash, ...], value: Value) -> None:
        """Add a value under a key and the hashes of its images."""
        for place in self._parts(key, hashes):
            self._places.setdefault(place, []).append((hashes, value))

    def _parts(self, key: Hashable, hashes: tuple[PictureHash, ...]) -> Iterator[Hashable]:
        if not hashes:
            yield key
            return
        width = -(-SIDE * SIDE // (self._distance + 1))
        for part in range(self._distance + 1):
            yield key, len(hashes), part, (hashes[0].bits >> part * width) & ((1 << width) - 1)
