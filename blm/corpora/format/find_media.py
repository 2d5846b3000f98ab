"""Resolve the media references of a corpus to files, without decoding them."""

from __future__ import annotations

from pathlib import Path

import PIL.Image

from blm.corpora.format.faults import RowError
from blm.media import MAX_PIXELS, VIDEOS, locate
from blm.types import BlmError


def find_media(reference: str, root: Path) -> Path:
    """Return the file of a media reference.

    Raises RowError for a file outside the folder, a missing file, and an image that is too large.
    """
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
    """Return width * height of an image [px] from its header; 0 if the header cannot be read."""
    try:
        with PIL.Image.open(path) as picture:
            return picture.width * picture.height
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        return PIL.Image.MAX_IMAGE_PIXELS or MAX_PIXELS + 1  # or more
    except (OSError, ValueError, SyntaxError):
        return 0  # decoding reports the fault
