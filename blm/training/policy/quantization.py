"""Quantisation of cached hidden states to int8."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def quantize_int8(hidden: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Quantise hidden states [tokens, d] to int8 with one float32 scale per token.

    Returns bytes [tokens, d + 4]. The quantisation is symmetric, with 254 steps: the error of a
    value is at most 1/254 of the largest value of its token.
    """
    scale = np.maximum(np.abs(hidden).max(-1, keepdims=True), 1e-12).astype(np.float32) / 127
    values = np.round(hidden / scale).astype(np.int8)
    return np.concatenate([values.view(np.uint8), scale.view(np.uint8)], axis=-1)


def dequantize_int8(stored: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Return the hidden states [tokens, d] that `quantize_int8` stored, as float16."""
    values, scale = stored[:, :-4].view(np.int8), np.ascontiguousarray(stored[:, -4:]).view(np.float32)
    return (values * scale).astype(np.float16)
