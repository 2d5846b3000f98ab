"""Augmentation of camera images: a random crop and colour jitter, as in GR00T N1.5.

Its transforms are a crop to 0.95 of the side, resized back, and torchvision's ColorJitter with
brightness 0.3, contrast 0.4, saturation 0.5 and hue 0.08 (`gr00t/experiment/data_config.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import PIL.Image

from blm.datasets.mixture import IndexArray
from blm.types import FloatArray, ImageArray

VERSION = "crop .95, jitter .3 .4 .5 .08"
"""Names the transforms in the spec of a cache."""
CROP = 0.95
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.3, 0.4, 0.5, 0.08
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in grey (ITU-R BT.601), as in torchvision."""


def augmented(
    images: Mapping[str, ImageArray], frames: IndexArray, views: IndexArray
) -> dict[str, ImageArray]:
    """Return images [n, height, width, 3] per camera, augmented where the view is not 0.

    The augmentation is a function of frame and view. All cameras of a frame get the same colours,
    as under one light, and each its own crop. The input stays as it is.
    """
    changed = {camera: pictures.copy() for camera, pictures in images.items()}
    for index in np.flatnonzero(views):
        rng = np.random.default_rng((int(frames[index]), int(views[index])))
        brightness, contrast, saturation = (
            rng.uniform(1 - most, 1 + most) for most in (BRIGHTNESS, CONTRAST, SATURATION)
        )
        hue = rng.uniform(-HUE, HUE)
        for pictures in changed.values():
            picture = _jittered(_cropped(pictures[index], rng), brightness, contrast, saturation)
            pictures[index] = _with_hue(picture.round().astype(np.uint8), hue)
    return changed


def _cropped(picture: ImageArray, rng: np.random.Generator) -> FloatArray:
    """Return a random square crop of the picture, resized to the picture's size."""
    height, width = picture.shape[:2]
    top, left = (rng.uniform(0, side * (1 - CROP)) for side in (height, width))
    box = (left, top, left + CROP * width, top + CROP * height)
    resized = PIL.Image.fromarray(picture).resize((width, height), PIL.Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized, np.float32)


def _jittered(picture: FloatArray, brightness: float, contrast: float, saturation: float) -> FloatArray:
    """Return the picture [height, width, 3], blended with black, its mean grey and its greys."""
    picture = (picture * brightness).clip(0, 255)
    mean = float((picture @ LUMA).mean())
    picture = (picture * contrast + mean * (1 - contrast)).clip(0, 255)
    grey = (picture @ LUMA)[..., None]
    return (picture * saturation + grey * (1 - saturation)).clip(0, 255)


def _with_hue(picture: ImageArray, turns: float) -> ImageArray:
    """Return the picture with its hue turned by a fraction of the colour circle."""
    hsv = np.array(PIL.Image.fromarray(picture).convert("HSV"))
    hsv[..., 0] += np.uint8(round(turns * 256) % 256)  # wraps around
    return np.asarray(PIL.Image.fromarray(hsv, "HSV").convert("RGB"))
