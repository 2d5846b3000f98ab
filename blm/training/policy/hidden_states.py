"""Hidden states H_k of prompts: their config, computed for every batch, and collated.

`hidden_state_cache.py` computes them once for all frames of a dataset instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blm.backbone.backbone import Backbone
from blm.backbone.pooling import MAX_POOL, tap_pooled
from blm.backbone.prompt import PromptOrder, control_prompt, require_order
from blm.chunks import frames_of, view_names
from blm.datasets.lerobot import EpisodeDataset
from blm.datasets.mixture import IndexArray
from blm.jobs import MAX_WORKERS
from blm.policy.tap import TapConfig
from blm.training.policy.augmentation import augmented
from blm.types import BlmError, ImageArray, require_numbers

HiddenStateRows = list[NDArray[np.floating[Any]]]
"""Hidden states [L_i, d] of some frames, or their codes [L_i, bytes]; prompts differ in length."""

CachePrecision = Literal["float16", "compact"]
MIN_DIMS = 16
"""Fewest channels of a compact cache."""


@dataclass(frozen=True, kw_only=True)
class HiddenStateConfig:
    """Which hidden states the policy is trained on, and how they are cached."""

    layer: int
    """Block k of the language model, counted from 1, whose output is H_k."""
    cameras: tuple[str, ...]
    """Cameras whose images the backbone sees."""
    frames: int = 1
    """Number of observations in a prompt: the frame itself, and earlier ones of its episode."""
    frame_steps: int = 8
    """Control steps between these observations. With more than one, it must equal --execute, because
    the policy remembers the observations of its decisions."""
    stride: int = 1
    """Cache every n-th frame of an episode, and its last frame.
    This number must divide --policy.future-steps."""
    batch_size: int = 32
    """Number of frames per forward pass of the backbone."""
    workers: int = 2
    """Worker processes of each training process; 0: the training process itself does their work.
    Without a cache, they decode frames and prepare prompts during training. With one, they fill it, on
    the CPU; on a GPU, each training process fills its shards with the backbone that it has."""
    shard_frames: int = 256
    """Number of cached frames after which the cache starts a new shard, at the next episode."""
    precision: CachePrecision = "float16"
    """Form of the cache: float16, or compact.
    Compact: about a byte for each of --intents.dims channels; its error is measured and printed."""
    dims: int = 1024
    """Channels that a compact cache keeps of each token: the principal components.
    With as many as the hidden size has, or more, all channels are kept as they are."""
    pool: int = 1
    """Average the picture tokens over squares of n x n tokens, also when the policy acts; 1: keep all.
    The checkpoint records it. It needs a vision tower whose tokens form a grid."""
    prompt: PromptOrder = "pictures_first"
    """Order of the prompt: pictures_first, or text_first, with which acting reads the text only once.
    The checkpoint records it; Stage I must have taught the same order (--prompt of the corpus)."""
    views: int = 0
    """Number of augmented versions of each frame (cropped images with other colours, see
    augmentation.py), which are cached as well. Training draws one version, or the frame itself."""

    def __post_init__(self) -> None:
        most = dict.fromkeys(("layer", "stride", "batch_size", "shard_frames"), (1, 10**9))
        require_numbers(self, **most, views=(0, 1000), workers=(0, MAX_WORKERS))
        require_numbers(self, dims=(MIN_DIMS, 1_000_000), pool=(1, MAX_POOL))
        require_numbers(self, frames=(1, 64), frame_steps=(1, 100_000))
        require_precision(self.precision)
        require_order(self.prompt)
        sizes = (self.layer, self.stride, self.batch_size, self.shard_frames, self.views + 1)
        if min(sizes) < 1 or not self.cameras:
            raise BlmError(f"hidden states: need a layer, cameras and positive sizes, got {self}")

    @property
    def tap(self) -> TapConfig:
        """How the policy obtains these hidden states."""
        return TapConfig(layer=self.layer, pool=self.pool, prompt=self.prompt)

    @property
    def views_of_prompt(self) -> list[str]:
        """Names of the images of a prompt, in order."""
        return view_names(self.cameras, self.frames, self.frame_steps)


def observed_images(
    dataset: EpisodeDataset, frames: IndexArray, config: HiddenStateConfig, views: IndexArray | None = None
) -> dict[str, ImageArray]:
    """Return the images [n, height, width, 3] of each name in the prompts of dataset frames.

    Before the beginning of an episode, its first frame is repeated. View 0 is the frame itself,
    others are augmented.
    """
    starts = dataset.starts[dataset.episode_index[frames]]
    ages = range((config.frames - 1) * config.frame_steps, -1, -config.frame_steps)
    seen = [
        {camera: dataset.frames(np.maximum(frames - age, starts), camera) for camera in config.cameras}
        for age in ages
    ]
    images = frames_of(seen, config.frames, config.frame_steps)
    return images if views is None else augmented(images, frames, views)


def require_precision(precision: str) -> None:
    """Raise BlmError for an unknown form of the cache."""
    if precision == "int8":
        raise BlmError(
            "precision 'int8' of older versions, with one scale a token, lost tokens with outlier channels; "
            "use 'compact', which is as small, or 'float16'"
        )
    if precision not in get_args(CachePrecision):
        raise BlmError(f"precision '{precision}' is unknown; valid: {', '.join(get_args(CachePrecision))}")


class LiveHiddenStates:
    """A `HiddenStateSource` that runs the backbone for each call; it needs no disk space."""

    codec = None
    """Its rows are not coded."""

    def __init__(self, backbone: Backbone, dataset: EpisodeDataset, config: HiddenStateConfig) -> None:
        self.backbone, self.dataset, self.config = backbone, dataset, config

    def read(self, frames: IndexArray, views: IndexArray | None = None) -> HiddenStateRows:
        """Return H_k of these dataset frames in these views; view 0 is the frame itself."""
        images = observed_images(self.dataset, frames, self.config, views)
        return self.tap([self.dataset.instructions[t] for t in self.dataset.task_index[frames]], images)

    def tap(self, instructions: Sequence[str], images: Mapping[str, ImageArray]) -> HiddenStateRows:
        """Return H_k of n control prompts: n texts, and images [n, height, width, 3] per view."""
        robot, order = self.dataset.space.robot, self.config.prompt
        prompts = [
            control_prompt(text, robot, {camera: images[camera][i] for camera in images}, order=order)
            for i, text in enumerate(instructions)
        ]
        rows: HiddenStateRows = []
        for start in range(0, len(prompts), self.config.batch_size):
            inputs = self.backbone.read(prompts[start : start + self.config.batch_size], side="right")
            tapped = tap_pooled(self.backbone, inputs, self.config.layer, self.config.pool)
            hidden, mask = tapped.hidden.float().cpu(), tapped.mask.bool().cpu()
            rows += [h[m].numpy() for h, m in zip(hidden, mask, strict=True)]
        return rows


def collate(rows: HiddenStateRows) -> tuple[Tensor, Tensor]:
    """Pad hidden states or codes on the right: [B, L, d] in their precision, and mask [B, L]."""
    lengths = np.array([len(row) for row in rows])
    hidden = np.zeros((len(rows), lengths.max(), rows[0].shape[1]), rows[0].dtype)
    for padded, row in zip(hidden, rows, strict=True):
        padded[: len(row)] = row
    return torch.from_numpy(hidden), torch.from_numpy(np.arange(hidden.shape[1]) < lengths[:, None])
