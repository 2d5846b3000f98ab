"""Rows -> batches: padding, and masks and positions under which turns of one row do not see each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blm.backbone import Backbone, Inputs
from blm.training.rows import Row
from blm.types import BlmError


@dataclass(frozen=True)
class RowBatch:
    ids: tuple[int, ...]
    """Indices of conversations."""
    inputs: Inputs
    learn: Tensor
    """[B, L] bool."""


def collate(backbone: Backbone, rows: Sequence[Row], ids: tuple[int, ...]) -> RowBatch:
    """Pad rows on the right; a batch with separated turns gets its own positions and attention mask."""
    shape = (len(rows), max(len(row.tokens) for row in rows))
    tokens = np.full(shape, backbone.processor.tokenizer.pad_token_id, dtype=np.int64)
    learn, valid, branch = (np.zeros(shape, dtype=kind) for kind in (bool, np.int64, np.int64))
    for at, row in enumerate(rows):
        place = (at, slice(len(row.tokens)))
        tokens[place], learn[place], branch[place], valid[place] = row.tokens, row.learn, row.branch, 1
    inputs = {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(valid)}
    pixels = [row.pixels for row in rows if row.pixels is not None]
    grids = [row.grid for row in rows if row.grid is not None]
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels)
    if grids:
        inputs["image_grid_thw"] = torch.cat(grids)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == backbone.processor.image_token_id).long()
    if branch.any():
        inputs |= _separation(backbone, inputs, branch)
    return RowBatch(ids, inputs, torch.from_numpy(learn))


def _separation(backbone: Backbone, inputs: Inputs, branch: np.ndarray) -> Inputs:
    """Return the attention mask and positions under which turns of one row do not see each other.

    A turn attends to what is shared (branch 0) and to itself, and counts on from the end of what is shared.
    Padding comes last, so the causal rule alone hides it.
    """
    if backbone.model.config._attn_implementation != "sdpa":
        raise BlmError("separate_turns needs a model loaded with sdpa attention; set separate_turns=False")
    at = np.arange(branch.shape[1])
    begins = np.diff(branch, axis=1, prepend=0) != 0
    begin = np.maximum.accumulate(np.where(begins, at, 0), axis=1)
    shared = np.argmax(branch > 0, axis=1)[:, None]
    back = torch.from_numpy(np.where(branch > 0, begin - shared, 0))
    positions = torch.from_numpy(at).expand_as(back)
    if "image_grid_thw" in inputs:  # three rows: M-RoPE
        positions, _ = backbone.model.base_model.get_rope_index(
            **{name: value for name, value in inputs.items() if name != "pixel_values"}
        )
    mine = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
    mask = torch.from_numpy(mine & (at[:, None] >= at[None, :]))[:, None]
    return {"position_ids": positions - back, "attention_mask": mask}
