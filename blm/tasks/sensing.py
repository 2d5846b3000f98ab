"""Errors of cameras and joint encoders, drawn from the seed of the episode and the control step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from blm.tasks.scene import CAMERAS
from blm.tasks.variation import SensorNoise
from blm.types import ImageArray, lookup

_STREAM = 6
"""Number of this random stream of an episode; see `blm.tasks.task_env`."""
_WIDTH = 112
"""Width of an image to which the blur refers [px]."""


class Sensors:
    """The cameras and joint encoders of one episode."""

    def __init__(
        self, noise: SensorNoise, seed: int, delivered: Mapping[str, ImageArray] | None = None
    ) -> None:
        self._noise, self._seed = noise, seed
        self.delivered = dict(delivered or {})
        """Camera -> the picture that it delivered last, if there are errors."""

    def picture(self, camera: str, step: int, take: Callable[[], ImageArray]) -> ImageArray:
        """Return what a camera delivers in a control step: `take()` with errors, or its last picture.

        Asking twice in one step gives the same.
        """
        if self._noise == SensorNoise():
            return take()
        lookup("camera", camera, CAMERAS)
        rng = np.random.default_rng((self._seed, _STREAM, step, 1 + [*CAMERAS].index(camera)))
        dropped = rng.random() < self._noise.dropped
        if not dropped or camera not in self.delivered:
            self.delivered[camera] = disturb_picture(take(), self._noise, rng)
        return self.delivered[camera]

    def state(self, state: NDArray[np.float32], step: int) -> NDArray[np.float32]:
        """Return measured joint positions [rad] and gripper opening, [D]; the latter has no error."""
        if not self._noise.joints:
            return state
        rng = np.random.default_rng((self._seed, _STREAM, step, 0))
        errors = self._noise.joints * rng.normal(size=len(state) - 1)
        return state + np.append(errors, 0.0).astype(np.float32)


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
