"""Errors of cameras and joint encoders, drawn from the seed of the episode and the control step."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from blm.tasks.variation import SensorNoise
from blm.types import ImageArray

_WIDTH = 112
"""Width of an image to which the blur refers [px]."""


def is_dropped(noise: SensorNoise, rng: np.random.Generator) -> bool:
    """Draw whether a camera delivers its previous picture again. It always uses one random number."""
    return bool(rng.random() < noise.dropped)


def disturb_picture(image: ImageArray, noise: SensorNoise, rng: np.random.Generator) -> ImageArray:
    """Return a picture uint8 [H, W, 3] with blur, exposure, pixel noise and JPEG artefacts, in this order."""
    if noise.blur:
        radius = noise.blur * image.shape[1] / _WIDTH
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))
    if noise.exposure != 1 or noise.pixel_noise:
        grain = noise.pixel_noise * rng.standard_normal(image.shape, dtype=np.float32)
        image = np.clip(image * np.float32(noise.exposure) + grain, 0, 255).round().astype(np.uint8)
    if noise.jpeg_quality:
        buffer = BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=noise.jpeg_quality)
        image = np.asarray(Image.open(buffer))
    return image


def disturb_state(
    state: NDArray[np.float32], noise: SensorNoise, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return joint positions [rad] and gripper opening, [D], with noise on the joint positions."""
    if not noise.joints:
        return state
    return state + np.append(noise.joints * rng.normal(size=len(state) - 1), 0.0).astype(np.float32)
