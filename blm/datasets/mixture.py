"""Weighted mixture of datasets: the samples in the batch of each step; and splits of episodes.

A batch is a function of (seed, step) alone: a resumed run gets the same batches as an uninterrupted
one, and workers need no shared state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blm.types import BlmError

IndexArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Draws a dataset by weight, then one of its samples uniformly, with replacement."""

    sizes: tuple[int, ...]
    """Number of samples in each dataset."""
    weights: tuple[float, ...]
    """One weight per dataset, on any scale; weights equal to `sizes` draw samples uniformly."""
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
    """Split episode numbers at random into (training, held out); `fraction` is held out.

    A positive fraction holds out at least one episode. Raises BlmError if none is left for
    training.
    """
    held = int(np.ceil(count * fraction))
    if not 0 <= held < count:
        raise BlmError(f"holding out {fraction:g} of {count} episodes leaves none to train on")
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])


def kept_frames(starts: IndexArray, stride: int) -> IndexArray:
    """Return every `stride`-th frame of each episode, and its last.

    `starts` [E + 1]: first frame of each episode, and the number of all frames.
    """
    frames = np.arange(starts[-1])
    episode = np.searchsorted(starts, frames, side="right") - 1
    return frames[((frames - starts[episode]) % stride == 0) | (frames == starts[episode + 1] - 1)]
