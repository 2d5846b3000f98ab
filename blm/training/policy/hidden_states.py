"""Hidden states H_k of prompts: their config, computed for every batch, augmented, and collated.

`hidden_state_cache.py` computes them once for all frames of a dataset instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blm.backbone.backbone import Backbone
from blm.backbone.prompt import control_prompt
from blm.datasets.lerobot import EpisodeDataset
from blm.datasets.mixture import IndexArray
from blm.jobs import MAX_WORKERS
from blm.types import BlmError, ImageArray, require_numbers

HiddenStateRows = list[NDArray[np.floating[Any]]]
"""Hidden states [L_i, d] of some frames; prompts differ in length."""


@dataclass(frozen=True, kw_only=True)
class HiddenStateConfig:
    """Which hidden states the policy is trained on, and how they are cached."""

    layer: int
    """Block k of the language model, counted from 1, whose output is H_k."""
    cameras: tuple[str, ...]
    """Cameras whose images the backbone sees."""
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
    precision: Literal["float16", "int8"] = "float16"
    """Precision of the cache.
    With int8 the cache takes half the space; its error is measured and stored in the manifest."""
    views: int = 0
    """Number of augmented versions of each frame (other light, shifted images) to cache as well."""

    def __post_init__(self) -> None:
        most = dict.fromkeys(("layer", "stride", "batch_size", "shard_frames"), (1, 10**9))
        require_numbers(self, **most, views=(0, 1000), workers=(0, MAX_WORKERS))
        sizes = (self.layer, self.stride, self.batch_size, self.shard_frames, self.views + 1)
        if min(sizes) < 1 or not self.cameras:
            raise BlmError(f"hidden states: need a layer, cameras and positive sizes, got {self}")


class LiveHiddenStates:
    """A `HiddenStateSource` that runs the backbone for each call; it needs no disk space."""

    def __init__(self, backbone: Backbone, dataset: EpisodeDataset, config: HiddenStateConfig) -> None:
        self.backbone, self.dataset, self.config = backbone, dataset, config

    def read(self, frames: IndexArray, views: IndexArray | None = None) -> HiddenStateRows:
        """Return H_k of these dataset frames in these views; view 0 is the frame itself."""
        images = {camera: self.dataset.frames(frames, camera) for camera in self.config.cameras}
        if views is not None:
            images = augmented(images, frames, views)
        return self.tap([self.dataset.instructions[t] for t in self.dataset.task_index[frames]], images)

    def tap(self, instructions: Sequence[str], images: Mapping[str, ImageArray]) -> HiddenStateRows:
        """Return H_k of n control prompts: n texts, and images [n, height, width, 3] per camera."""
        prompts = [
            control_prompt(text, self.dataset.space.robot, {camera: images[camera][i] for camera in images})
            for i, text in enumerate(instructions)
        ]
        rows: HiddenStateRows = []
        for start in range(0, len(prompts), self.config.batch_size):
            inputs = self.backbone.read(prompts[start : start + self.config.batch_size], side="right")
            tapped = self.backbone.tap(self.backbone.place(inputs), self.config.layer)
            hidden, mask = tapped.hidden.float().cpu(), inputs["attention_mask"].bool()
            rows += [h[m].numpy() for h, m in zip(hidden, mask, strict=True)]
        return rows


def augmented(
    images: Mapping[str, ImageArray], frames: IndexArray, views: IndexArray
) -> dict[str, ImageArray]:
    """Return images with random augmentation where the view is not 0, seeded by frame and view.

    Brightness and contrast change by up to 30 %, each colour channel by up to 10 %, and the image
    shifts by up to 3 % of its side, with the border repeated. These are about the choices of GR00T
    N1.5, without those that would hide small objects.
    """
    changed = {camera: pictures.copy() for camera, pictures in images.items()}
    for index in np.flatnonzero(views):
        rng = np.random.default_rng((int(frames[index]), int(views[index])))
        gain = rng.uniform(0.7, 1.3) * rng.uniform(0.9, 1.1, 3)
        contrast = rng.uniform(0.7, 1.3)
        for pictures in changed.values():
            picture = pictures[index].astype(np.float32)
            picture = ((picture - picture.mean()) * contrast + picture.mean()) * gain
            margin = round(0.03 * picture.shape[0])
            down, right = rng.integers(0, 2 * margin + 1, 2)
            padded = np.pad(picture, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
            shifted = padded[down : down + picture.shape[0], right : right + picture.shape[1]]
            pictures[index] = shifted.clip(0, 255).round().astype(np.uint8)
    return changed


def collate(rows: HiddenStateRows) -> tuple[Tensor, Tensor]:
    """Pad hidden states on the right: [B, L, d] in their precision, and mask [B, L]."""
    lengths = np.array([len(row) for row in rows])
    hidden = np.zeros((len(rows), lengths.max(), rows[0].shape[1]), rows[0].dtype)
    for padded, row in zip(hidden, rows, strict=True):
        padded[: len(row)] = row
    return torch.from_numpy(hidden), torch.from_numpy(np.arange(hidden.shape[1]) < lengths[:, None])
