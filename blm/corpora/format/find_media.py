"""Resolve the media references of a corpus to files, and read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO

import PIL.Image

from blm.corpora.format.faults import RowError
from blm.media import (
    MAX_PIXELS,
    VIDEOS,
    load_pixels,
    locate,
    read_frames,
    require_8_bits,
    split_time,
    video_seconds,
)
from blm.types import BlmError, Image, ImageArray

ORIENTATION = 0x0112
"""EXIF tag of how a picture is to be turned; 5 to 8 exchange width and height."""


def find_media(reference: str, root: Path) -> Path:
    """Return the file of a media reference.

    Raises RowError for a file outside the folder, a missing file, and an image as `image_size` does.
    """
    try:
        path = locate(reference, root)
    except BlmError as error:
        raise RowError("media outside the folder", str(error)) from None
    if not path.is_file():
        raise RowError("media missing", reference)
    if path.suffix.lower() not in VIDEOS:
        image_size(path, reference)
    return path


def image_size(file: Path | IO[bytes], reference: str) -> tuple[int, int] | None:
    """Return width and height of an image, upright, from its header; None if it cannot be read.

    Raises RowError for an image that is too large, and for one of more than 8 bits in one channel.
    """
    try:
        with PIL.Image.open(file) as picture:
            size = picture.size
            if size[0] * size[1] <= MAX_PIXELS:
                require_8_bits(picture, reference)
                turned = picture.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
                return size[::-1] if turned else size
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        size = (PIL.Image.MAX_IMAGE_PIXELS or MAX_PIXELS + 1, 1)  # or more
    except BlmError as error:
        raise RowError("media unreadable", str(error)) from None
    except (OSError, ValueError, SyntaxError):
        return None  # decoding reports the fault
    raise RowError("media too large", f"{reference}: {size[0] * size[1]:,} px")


def read_references(file: str, references: Sequence[str], root: Path) -> dict[str, ImageArray | RowError]:
    """Return the pixels or the fault of each reference to one file, which is opened once."""
    try:
        path = find_media(file, root)
        times = [split_time(reference)[1] for reference in references]
        late = [reference for reference, time in zip(references, times, strict=True) if time is not None]
        if late and (seconds := video_seconds(path)) < max(t for t in times if t is not None):
            raise RowError("time after the end", f"{late[-1]} of {seconds:.3f} s")
        if late and None not in times:
            pictures: Sequence[ImageArray] = read_frames(path, [t for t in times if t is not None])
        else:
            pictures = [load_pixels(Image(path=reference), root) for reference in references]
    except RowError as error:
        return dict.fromkeys(references, error)
    except BlmError as error:
        return dict.fromkeys(references, RowError("media unreadable", str(error)))
    return dict(zip(references, pictures, strict=True))
