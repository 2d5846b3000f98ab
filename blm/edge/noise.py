"""The noise of a seed, the same as torch draws on a CPU, without torch.

torch fills a tensor of 16 or more numbers in groups of 16 by the Box-Muller transform of uniform
numbers of 24 bits from a Mersenne Twister (`normal_fill` in aten/src/ATen/native/cpu). So an
exported policy starts from the noise of the policy that it was exported from, up to the rounding of
log, cos and sin (1e-6).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from blm.types import BlmError

GROUP = 16
"""Numbers per group; torch draws fewer than that in another way."""


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return standard normal noise [len(seeds), *shape]; row i depends on seed i alone.

    Raises BlmError for fewer than 16 numbers per row.
    """
    return np.stack([_normal(seed, prod(shape)).reshape(shape) for seed in seeds])


def _normal(seed: int, count: int) -> NDArray[np.float32]:
    if count < GROUP:
        raise BlmError(f"noise of {count} numbers per chunk; at least {GROUP} are needed")
    twister = np.random.RandomState(seed & 0xFFFFFFFF)
    uniform = _uniform(twister, count)
    whole = count - count % GROUP
    out = np.empty(count, np.float32)
    out[:whole] = _box_muller(uniform[:whole])
    if whole < count:  # the last 16 numbers are drawn anew
        out[-GROUP:] = _box_muller(_uniform(twister, GROUP))
    return out


def _uniform(twister: np.random.RandomState, count: int) -> NDArray[np.float32]:
    """Return numbers in [0, 1) of 24 random bits each."""
    bits = twister.randint(0, 2**32, count, np.uint32) & 0xFFFFFF
    return bits.astype(np.float32) * np.float32(2**-24)


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    first, second = uniform.reshape(-1, 2, GROUP // 2).swapaxes(0, 1)
    radius = np.sqrt(np.float32(-2) * np.log(1 - first))
    angle = np.float32(2 * np.pi) * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
