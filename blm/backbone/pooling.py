"""Mean pooling of the picture tokens of hidden states, over squares of the picture's token grid.

It is defined on H_k, so it applies to every model whose picture tokens form a grid in reading
order; the tokens of the text stay. Shapes: B prompts, L positions, L' positions after pooling, N =
pool * pool, d hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blm.backbone.model import HiddenStates, Inputs, MultimodalModel
from blm.backbone.prefix_cache import PrefixCache
from blm.types import BlmError

WITHOUT_GRID: Mapping[str, str] = {
    "blm_conv_vision": "its tokens are the things that it found and the quarters of the picture",
    "blm_scene_vision": "some of its tokens are the words and digits of the things that it found",
}
"""`model_type` of a vision tower -> the reason why its tokens form no grid."""
MAX_POOL = 16
"""Largest side of a pooled square."""


@dataclass(frozen=True)
class Pooling:
    """Which positions are averaged to which."""

    positions: Tensor
    """[B, L', N] positions; those of weight 0 do not count."""
    weights: Tensor
    """[B, L', N]"""
    mask: Tensor
    """[B, L'] False at padding."""

    def to(self, device: torch.device) -> Pooling:
        """Return a copy on a device; copying from pinned memory does not block the host."""
        tensors = (self.positions, self.weights, self.mask)
        return Pooling(*(tensor.to(device, non_blocking=True) for tensor in tensors))

    def pin_memory(self) -> Pooling:
        """Return a copy in pinned (page-locked) memory."""
        return Pooling(self.positions.pin_memory(), self.weights.pin_memory(), self.mask.pin_memory())

    def __call__(self, hidden: Tensor) -> HiddenStates:
        """Return the pooled states [B, L', d] of hidden states [B, L, d]."""
        rows = torch.arange(len(hidden), device=hidden.device)[:, None, None]
        members = hidden[rows, self.positions] * self.weights[..., None].to(hidden.dtype)
        return HiddenStates(members.sum(2), self.mask)


def tap_pooled(
    model: MultimodalModel, inputs: Inputs, layer: int, pool: int, prefixes: PrefixCache | None = None
) -> HiddenStates:
    """Return H_k with pooled picture tokens; `inputs` are those of `read`, padded on the right.

    With `pool` 1 no token is pooled. `prefixes` caches the texts before the pictures for taps of
    this model after this layer. Raises BlmError as `tap` and `picture_grids` do.
    """
    pooling = None
    if pool > 1:  # copied before the model runs
        pooling = make_pooling(model, inputs, pool).to(model.model.device)
    tapped = model.tap(inputs, layer) if prefixes is None else prefixes.tap(inputs)
    return tapped if pooling is None else pooling(tapped.hidden)


def make_pooling(model: MultimodalModel, inputs: Inputs, pool: int) -> Pooling:
    """Return the pooling of prompts, whose inputs are on the CPU, over squares of `pool` x `pool`
    tokens. At the edge of a grid that `pool` does not divide, the squares are smaller.

    A pooled token is at the place of the square's first token. Raises BlmError as `picture_grids`
    does.
    """
    ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].bool().numpy()
    grids = iter(picture_grids(model, inputs))
    leaders = []
    for row in range(len(ids)):
        leader = np.arange(ids.shape[1])
        places = np.flatnonzero(ids[row] == model.placeholder_id)
        while len(places):
            height, width = next(grids)
            mine, places = places[: height * width], places[height * width :]
            leader[mine] = mine[_first_of_square(height, width, pool)]
        leaders.append(leader)
    lengths = [len(np.unique(leader[real])) for leader, real in zip(leaders, mask, strict=True)]
    positions = np.zeros((len(ids), max(lengths), pool * pool), np.int64)
    weights = np.zeros(positions.shape, np.float32)
    for row, (leader, real) in enumerate(zip(leaders, mask, strict=True)):
        where = np.flatnonzero(real)
        _, square, count = np.unique(leader[where], return_inverse=True, return_counts=True)
        order = np.argsort(square, kind="stable")
        turn = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
        positions[row, square[order], turn] = where[order]
        weights[row, square[order], turn] = 1 / count[square[order]]
    real = np.arange(positions.shape[1]) < np.array(lengths)[:, None]
    return Pooling(torch.from_numpy(positions), torch.from_numpy(weights), torch.from_numpy(real))


def _first_of_square(height: int, width: int, pool: int) -> NDArray[np.int64]:
    """Return for each token of a grid, in reading order, the first token of its square."""
    rows, columns = np.divmod(np.arange(height * width), width)
    return rows // pool * pool * width + columns // pool * pool


def pooled_count(height: int, width: int, pool: int) -> int:
    """Return the number of tokens of a picture after pooling."""
    return math.ceil(height / pool) * math.ceil(width / pool)


def picture_grids(model: MultimodalModel, inputs: Inputs) -> list[tuple[int, int]]:
    """Return height and width [tokens] of each picture, in reading order.

    Qwen-VL states them; pictures of other families become squares. Raises BlmError for a model
    whose picture tokens form no grid.
    """
    if "image_grid_thw" in inputs:
        merge = int(model.processor.image_processor.merge_size)
        return [(int(h) // merge, int(w) // merge) for _, h, w in inputs["image_grid_thw"]]
    kind = model.model.config.vision_config.model_type
    pictures = len(inputs.get("pixel_values", ()))
    tokens = int((inputs["input_ids"] == model.placeholder_id).sum())
    side = math.isqrt(tokens // max(pictures, 1))
    reason = WITHOUT_GRID.get(kind, "")
    if not reason and side * side * pictures != tokens:
        reason = f"it makes {tokens} tokens of {pictures} pictures, which are no squares"
    if reason:
        raise BlmError(
            f"picture tokens of the vision tower '{kind}' cannot be pooled, because they form no grid: "
            f"{reason}; use pool 1"
        )
    return [(side, side)] * pictures
