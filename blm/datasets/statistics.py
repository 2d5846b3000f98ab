"""Exact statistics of vectors, and histogram statistics of sampled images.

LeRobot aggregates quantiles as weighted means of per-episode quantiles, which can be far from the
quantiles of the data. Normalisation needs exact quantiles, so they are computed over all frames at
once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blm.types import BlmError, FloatArray, ImageArray

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
SAMPLED_FRAMES = 8
"""Number of frames per video from which its pixel statistics are computed."""
Histogram = NDArray[np.int64]
"""[3, 256] counts of the 8-bit values of each colour channel."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Exact statistics of one vector feature over all frames of a dataset, [D] each."""

    min: FloatArray
    max: FloatArray
    mean: FloatArray
    std: FloatArray
    q01: FloatArray
    q10: FloatArray
    q50: FloatArray
    q90: FloatArray
    q99: FloatArray
    count: int

    def to_json(self) -> dict[str, Any]:
        return {k: v if isinstance(v, int) else np.asarray(v).tolist() for k, v in vars(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Stats:
        arrays: dict[str, Any] = {k: np.asarray(v, dtype=np.float64) for k, v in data.items() if k != "count"}
        return cls(count=int(data["count"]), **arrays)


def compute_stats(array: NDArray[Any]) -> Stats:
    """Return the statistics of the N rows of `array` [N] or [N, D], [D] each.

    Raises BlmError when empty.
    """
    if not len(array):
        raise BlmError(f"statistics need an array [N, D] with N >= 1, got shape {array.shape}")
    values = np.asarray(array, dtype=np.float64).reshape(len(array), math.prod(array.shape[1:]))
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return Stats(
        min=values.min(axis=0),
        max=values.max(axis=0),
        mean=values.mean(axis=0),
        std=values.std(axis=0),
        count=len(values),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    )


def image_histogram(frames: ImageArray) -> Histogram:
    """Return the histogram [3, 256] of a few evenly spaced frames of [T, H, W, 3]."""
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, SAMPLED_FRAMES).astype(int))]
    return np.stack([np.bincount(chosen[..., c].ravel(), minlength=256) for c in range(3)])


def histogram_stats(histogram: Histogram) -> Stats:
    """Return statistics of pixel values in [0, 1], each of LeRobot's shape [3, 1, 1]."""
    values = np.arange(256) / 255.0
    shares = np.cumsum(histogram, axis=1) / histogram.sum(axis=1, keepdims=True)
    mean = np.array([np.average(values, weights=channel) for channel in histogram])
    variance = [np.average((values - m) ** 2, weights=c) for m, c in zip(mean, histogram, strict=True)]

    def at(q: float) -> FloatArray:
        return values[np.argmax(shares >= q, axis=1)].reshape(3, 1, 1)

    return Stats(
        min=at(1e-12),
        max=at(1.0),
        mean=mean.reshape(3, 1, 1),
        std=np.sqrt(variance).reshape(3, 1, 1),
        count=int(histogram[0].sum()),
        **{name: at(q) for name, q in QUANTILES.items()},
    )
