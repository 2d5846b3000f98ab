"""True statistics of vector features, and of pictures through exact histograms of sampled frames.

LeRobot's own aggregated quantiles are weighted means of per-episode quantiles, which can be far from the
quantiles of the data. Normalisation needs the real ones, so these are computed over all frames at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blm.types import BlmError, FloatArray, ImageArray, Stats

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
Histogram = NDArray[np.int64]
"""[3, 256] counts of the 8-bit values of each colour channel."""


def compute_stats(array: FloatArray) -> Stats:
    """Return the statistics of the N rows of `array` [N, D]. Raises BlmError when it is empty or not 2-D."""
    values = np.asarray(array, dtype=np.float64)
    if values.ndim != 2 or len(values) == 0:
        raise BlmError(f"statistics need an array [N, D] with N >= 1, got shape {values.shape}")
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return Stats(
        min=values.min(axis=0),
        max=values.max(axis=0),
        mean=values.mean(axis=0),
        std=values.std(axis=0),
        count=len(values),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    )


def image_histogram(frames: ImageArray, samples: int = 8) -> Histogram:
    """Return the histogram [3, 256] of at most `samples` evenly spaced frames of [T, H, W, 3]."""
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, min(samples, len(frames))).astype(int))]
    return np.stack([np.bincount(chosen[..., c].ravel(), minlength=256) for c in range(3)]).astype(np.int64)


def histogram_stats(histogram: Histogram) -> Stats:
    """Return statistics of pixel values scaled to [0, 1], each of shape [3, 1, 1] as LeRobot stores them."""
    values = np.arange(256) / 255.0
    total = histogram.sum(axis=1, keepdims=True)
    mean = histogram @ values / total[:, 0]
    variance = histogram @ values**2 / total[:, 0] - mean**2
    cumulative = np.cumsum(histogram, axis=1) / total

    def at(q: float) -> FloatArray:
        return values[np.argmax(cumulative >= q, axis=1)].reshape(3, 1, 1)

    return Stats(
        min=at(1e-12),
        max=at(1.0),
        mean=mean.reshape(3, 1, 1),
        std=np.sqrt(np.maximum(variance, 0.0)).reshape(3, 1, 1),
        count=int(total[0, 0]),
        **{name: at(q) for name, q in QUANTILES.items()},
    )
