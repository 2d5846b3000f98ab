"""Picture processing as two table look-ups, on any device, where they give the processor's own bits.

A processor that neither resizes nor crops a picture only maps the 256 levels of each colour to
numbers (scaling, normalisation) and arranges them (channels first, patches). Both parts are found
by processing test pictures, and the result is compared bit for bit with the processor's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blm.types import ImageArray

LEVELS = 256
"""Number of values of a uint8."""
Process = Callable[[Sequence[ImageArray]], Tensor]
"""Pictures [height, width, 3] -> `pixel_values`, the rows of one picture after those of another."""


@dataclass(frozen=True, eq=False)
class PixelMap:
    """A processor of pictures of one size: pixel_values[i] = levels[colour of i, picture[source[i]]]."""

    shape: tuple[int, ...]
    """Shape of `pixel_values` of one picture."""
    source: Tensor
    """[elements] position in the flattened picture of each element of `pixel_values`."""
    levels: Tensor
    """[3 * 256] number for each level of red, green and blue."""

    def __call__(self, pictures: Tensor) -> Tensor:
        """Return `pixel_values` of uint8 [n, height, width, 3] on its device, in the precision of
        `levels`."""
        colour = torch.arange(3, device=pictures.device) * LEVELS
        numbers = self.levels[pictures + colour].flatten(1)
        return numbers[:, self.source].view(len(pictures) * self.shape[0], *self.shape[1:])

    def to(self, device: torch.device, dtype: torch.dtype) -> PixelMap:
        """Return a copy on a device; its results have the bits of float32 results that are then
        converted to `dtype`."""
        return PixelMap(self.shape, self.source.to(device), self.levels.to(device, dtype))


def find_pixel_map(process: Process, height: int, width: int) -> PixelMap | None:
    """Return the map of a processor for pictures of this size.

    The result is None if the processor does something else with them, such as resizing.
    """
    size = height * width * 3

    def processed(values: np.ndarray) -> np.ndarray:
        picture = np.broadcast_to(values, size).astype(np.uint8).reshape(height, width, 3)
        return process([picture]).numpy()

    dark, bright = processed(np.zeros(1)), processed(np.full(1, LEVELS - 1))
    if dark.shape != bright.shape or (dark == bright).any():
        return None
    source = np.zeros(dark.shape, np.int64)
    for bit in range(size.bit_length()):  # each pixel shows the digits of its position, one by one
        shown = processed((np.arange(size) >> bit & 1) * (LEVELS - 1))
        if shown.shape != dark.shape or not ((shown == dark) | (shown == bright)).all():
            return None
        source |= (shown == bright).astype(np.int64) << bit
    if source.max() >= size:
        return None
    levels = np.zeros((3, LEVELS), dark.dtype)
    for shift in range(0, LEVELS, height * width):
        shades = (np.arange(size) // 3 + shift) % LEVELS
        levels[source % 3, shades[source]] = processed(shades)
    found = PixelMap(dark.shape, torch.from_numpy(source.reshape(-1)), torch.from_numpy(levels.reshape(-1)))
    noise = np.random.default_rng(0).integers(0, LEVELS, (2, height, width, 3), dtype=np.uint8)
    return found if torch.equal(found(torch.from_numpy(noise)), process(list(noise))) else None
