"""What the vision towers of Qwen-VL compute from the sizes of their pictures, computed on the CPU.

Positions, windows and lengths depend only on the grids of patches. On a GPU, the towers would read
these numbers back from it again and again, and each time wait for all work before. They take the
values ready-made instead (transformers' `vision_utils`), and equal grids, such as those of a
robot's cameras, are computed and copied once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import vision_utils
from transformers.utils.generic import is_flash_attention_requested

Grid = tuple[int, int, int]
"""Patches of one picture or video: in time, vertically, horizontally."""


@dataclass(frozen=True)
class _Tower:
    """The settings of a vision tower that the values depend on."""

    merge: int
    window: tuple[int, int] | None
    """Width of a window and of a patch [px]; None: no windows (Qwen3-VL)."""
    table: tuple[int, str, bool] | None
    """Side of the table of position embeddings and how it is interpolated; None: no table
    (Qwen2.5-VL)."""
    flash: bool
    """Whether lengths are read on the device (flash attention), or on the host."""

    @classmethod
    def of(cls, visual: Any) -> _Tower:
        has_windows = hasattr(visual, "fullatt_block_indexes")
        table = None
        if hasattr(visual, "num_grid_per_side"):
            table = (
                visual.num_grid_per_side,
                visual.interpolation_mode,
                visual.interpolation_align_corners,
            )
        return cls(
            merge=visual.spatial_merge_size,
            window=(visual.window_size, visual.patch_size) if has_windows else None,
            table=table,
            flash=is_flash_attention_requested(visual.config),
        )


def plan_on_cpu(model: nn.Module, kind: str) -> None:
    """Let the vision tower of a Qwen2.5-VL or Qwen3-VL model, by its `model_type`, take these values
    from here; other models stay as they are."""
    if kind not in ("qwen2_5_vl", "qwen3_vl"):
        return
    visual = model.get_submodule("model.visual")
    if _add_plan not in visual._forward_pre_hooks.values():
        visual.register_forward_pre_hook(_add_plan, with_kwargs=True)


def _add_plan(visual: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    grids = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
    if grids is None:
        return None
    key = tuple(tuple(grid) for grid in grids.tolist())
    device = next(visual.parameters()).device
    return args, {**_plan(key, _Tower.of(visual), device), **kwargs}


@lru_cache(maxsize=32)
def _plan(grids: tuple[Grid, ...], tower: _Tower, device: torch.device) -> Mapping[str, Any]:
    """Return the values by the names under which transformers takes them."""
    grid = torch.tensor(grids)
    lengths = {"cu_seqlens": vision_utils.get_vision_cu_seqlens(grid)}
    placed = {"position_ids": vision_utils.get_vision_position_ids(grid, tower.merge)}
    if tower.window is not None:
        index, lengths["cu_window_seqlens"] = vision_utils.get_vision_window_index(
            grid, spatial_merge_size=tower.merge, window_size=tower.window[0], patch_size=tower.window[1]
        )
        placed["window_index"] = index
    if tower.table is not None:
        side, mode, align = tower.table
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid, side, mode=mode, align_corners=align, spatial_merge_size=tower.merge
        )
        placed |= {"interp_indices": indices, "interp_weights": weights}
    longest = dict[str, int]()
    if tower.flash:
        names = {"cu_seqlens": "max_seqlen", "cu_window_seqlens": "max_window_seqlen"}
        longest = {names[name]: int(ends.diff().max()) for name, ends in lengths.items()}
        placed |= lengths
        lengths = {}
    on_device: dict[str, Tensor] = {name: value.to(device) for name, value in placed.items()}
    return {**on_device, **lengths, **longest}
