"""Resolve the media references of a corpus to files, without decoding them."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import PIL.Image

from blm.corpora.format.faults import RowError
from blm.media import MAX_PIXELS, VIDEOS, locate, require_8_bits
from blm.types import BlmError

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
