"""Fitting of camera pictures to the square that a policy sees. Training and control share it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from blm.errors import BlmError, ContractError

ImageArray = NDArray[np.uint8]
PictureFit = Literal["exact", "letterbox", "crop"]
"""How pictures become squares. "exact": they are squares of the right size already. "letterbox": the
whole picture, scaled, with black bars. "crop": the square in its middle, scaled."""
PICTURE_FITS: tuple[str, ...] = get_args(PictureFit)
MAX_SIDE = 8192
"""Maximum side of a picture that is fitted [px]."""


def fit_picture(picture: NDArray[Any], fit: PictureFit, side: int, what: str) -> ImageArray:
    """Return uint8 [height, width, 3] as [side, side, 3]; a square of that size is returned as it is.

    The same picture gives the same bits on every machine: Pillow scales with integers (bilinear,
    over the area that a new pixel covers). `what` names the picture in the ContractError for any
    other shape or type, and for another size with the fit "exact".
    """
    if picture.dtype == np.uint8 and picture.shape == (side, side, 3):
        return picture
    sides = picture.shape[:2]
    valid = picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    if fit == "exact" or not valid or not 1 <= min(sides) <= max(sides) <= MAX_SIDE:
        needed = f"({side}, {side}, 3)" if fit == "exact" else f"(height, width, 3) of 1..{MAX_SIDE} px"
        raise ContractError(f"{what} is {picture.dtype} {picture.shape}, needed: uint8 {needed}")
    from PIL import Image  # here, because a client with pictures of the right size does not need it

    height, width = sides
    if fit == "crop":
        edge = min(height, width)
        top, left = (height - edge) // 2, (width - edge) // 2
        square = Image.fromarray(picture[top : top + edge, left : left + edge])
        return np.asarray(square.resize((side, side), Image.Resampling.BILINEAR))
    scale = side / max(height, width)
    new_height, new_width = (max(1, round(edge * scale)) for edge in (height, width))
    scaled = Image.fromarray(picture).resize((new_width, new_height), Image.Resampling.BILINEAR)
    out = np.zeros((side, side, 3), np.uint8)
    top, left = (side - new_height) // 2, (side - new_width) // 2
    out[top : top + new_height, left : left + new_width] = np.asarray(scaled)
    return out


def resized(picture: ImageArray, side: int, resample: int) -> ImageArray:
    """Return a square picture with `side` px; `resample` is the number of Pillow's filter. One that
    has this size already is returned as it is."""
    if picture.shape[:2] == (side, side):
        return picture
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling(resample)))


def joint_fit(fits: set[PictureFit]) -> PictureFit:
    """Return the one way in which pictures become squares; "exact" goes with any. Raises BlmError."""
    found = sorted(fits - {"exact"})
    if len(found) > 1:
        raise BlmError(f"one policy has one picture_fit; the data have {' and '.join(found)}")
    return found[0] if found else "exact"
