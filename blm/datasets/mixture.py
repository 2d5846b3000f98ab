"""Which samples make up the batch of a step, over several datasets with weights.

A batch is a function of (seed, step) alone: a resumed run sees the batches that the uninterrupted one would
have seen, and workers need no shared state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blm.types import BlmError

IndexArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Draw a dataset by weight, then one of its samples uniformly, with replacement."""

    sizes: tuple[int, ...]
    """Samples in each dataset."""
    weights: tuple[float, ...]
    """One per dataset, any positive scale. `sizes` themselves weight every sample equally."""
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.weights) or not self.sizes:
            raise BlmError(f"mixture: {len(self.weights)} weights for {len(self.sizes)} datasets")
        if min(self.sizes) < 1 or min(self.weights) <= 0 or self.batch_size < 1:
            raise BlmError(f"mixture: sizes, weights and batch size must be positive, got {self}")

    def batch(self, step: int) -> tuple[IndexArray, IndexArray]:
        """Return dataset numbers [B], ascending, and sample numbers [B] within each dataset."""
        rng = np.random.default_rng([self.seed, step])
        shares = np.asarray(self.weights) / np.sum(self.weights)
        datasets = np.sort(rng.choice(len(self.sizes), size=self.batch_size, p=shares))
        return datasets, rng.integers(np.asarray(self.sizes)[datasets])


def split_episodes(count: int, fraction: float, seed: int) -> tuple[IndexArray, IndexArray]:
    """Split episode numbers into (training, held out), a `fraction` of them held out, at random by `seed`.

    A positive fraction holds out at least one episode. Raises BlmError when none would be left to train on.
    """
    held = int(np.ceil(count * fraction))
    if not 0 <= held < count:
        raise BlmError(f"holding out {fraction:g} of {count} episodes leaves none to train on")
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])


def kept_frames(starts: IndexArray, stride: int) -> IndexArray:
    """Return every `stride`-th frame of each episode, and its last; `starts` [E + 1] as in a dataset."""
    frames = np.arange(starts[-1])
    episode = np.searchsorted(starts, frames, side="right") - 1
    return frames[((frames - starts[episode]) % stride == 0) | (frames == starts[episode + 1] - 1)]
