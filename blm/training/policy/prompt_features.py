"""Prompts of frames with cached vision features: what a tuned backbone reads in every step.

    features/<dataset>/  spec.json  journal.jsonl  00000.safetensors ..  manifest.json

The vision tower is frozen, so its features of a frame are computed once; only the blocks of the
language model run in a step. All images of a dataset have one size, so each frame has the same
number of features. A text is tokenised once for each instruction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from blm.backbone import Backbone, Inputs, control_prompt
from blm.datasets.lerobot import EpisodeDataset
from blm.datasets.mixture import IndexArray, kept_frames
from blm.io import replacing
from blm.jobs import Result, WorkUnit
from blm.training.caches.files import ShardFile, describe_file
from blm.training.caches.filling import Cache, fill_cache
from blm.training.loop.distributed import Processes
from blm.training.policy.cache_workers import FrameWorkers, WriteShard
from blm.training.policy.hashed_backbone import HashedBackbone
from blm.training.policy.hidden_state_cache import describe
from blm.training.policy.hidden_states import HiddenStateConfig, observed_images
from blm.training.sft.tokenize import TokenizedExample, VisionInputs, vision_inputs_of
from blm.training.sft.vision_features import PictureFeatures, encode_pictures
from blm.types import ImageArray

FORMAT = 3
"""Version of these caches; older ones had no manifest."""


@dataclass(frozen=True, kw_only=True)
class PromptShard(ShardFile):
    """A file of the cache, as the manifest describes it."""

    frames: Sequence[int]
    """Dataset frames, in order; each has one row per view."""


@dataclass(frozen=True)
class PromptReader:
    """Reads the images of frames, and makes control prompts of them."""

    backbone: Backbone
    dataset: EpisodeDataset
    config: HiddenStateConfig

    def inputs(self, instructions: Sequence[str], images: Sequence[dict[str, ImageArray]]) -> Inputs:
        """Return the inputs of prompts on the CPU, padded on the right."""
        robot, order = self.dataset.space.robot, self.config.prompt
        prompts = [
            control_prompt(text, robot, views, order=order)
            for text, views in zip(instructions, images, strict=True)
        ]
        return self.backbone.read(prompts, side="right")

    def templates(self) -> list[TokenizedExample]:
        """Return the prompt of each instruction, without vision features."""
        side = self.dataset.image_size
        blank = dict.fromkeys(self.config.views_of_prompt, np.zeros((side, side, 3), np.uint8))
        return [self._template(text, blank) for text in self.dataset.instructions]

    def _template(self, text: str, blank: dict[str, ImageArray]) -> TokenizedExample:
        inputs = self.inputs([text], [blank])
        positions = self.backbone.position_ids(inputs).reshape(-1, inputs["input_ids"].shape[1])
        tokens = inputs["input_ids"][0].numpy()
        return TokenizedExample(
            tokens=tokens,
            loss_mask=np.zeros(len(tokens), dtype=bool),
            segment_ids=np.zeros(len(tokens), dtype=np.int64),
            position_ids=positions.numpy(),
        )

    def features(self, frames: IndexArray, views: IndexArray) -> PictureFeatures:
        """Return the vision features of frames in these views: each tensor is [n, ..]."""
        images = observed_images(self.dataset, frames, self.config, views)
        each = [{camera: images[camera][i] for camera in images} for i in range(len(frames))]
        text = self.dataset.instructions[self.dataset.task_index[frames[0]]]
        inputs = self.inputs([text] * len(frames), each)
        pixels = {name: torch.cat(parts) for name, parts in vision_inputs_of(inputs).items()}
        found = encode_pictures(self.backbone, pixels)
        return {name: value.unflatten(0, (len(frames), -1)) for name, value in found.items()}

    def write(self, payload: tuple[Path, IndexArray]) -> Result:
        """Write the shard of a payload: its path and its frames."""
        path, frames = payload
        copies, size = self.config.views + 1, self.config.batch_size
        rows, views = np.repeat(frames, copies), np.tile(np.arange(copies), len(frames))
        parts = [
            self.features(rows[begin : begin + size], views[begin : begin + size])
            for begin in range(0, len(rows), size)
        ]
        with replacing(path) as temporary:
            save_file({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, temporary)
        return {"frames": frames.tolist(), **describe_file(path)}


@dataclass(frozen=True)
class StoredRow:
    """The cached vision features of a frame, which are read when its prompt is used."""

    file: Any
    """An open safetensors file."""
    row: int

    def read(self) -> VisionInputs:
        """Return the features, by name."""
        return {name: (self.file.get_slice(name)[self.row],) for name in self.file.keys()}  # noqa: SIM118


class CachedPrompts:
    """A source of frames for the sampler: control prompts with cached vision features."""

    codec = None
    """Its rows are not coded."""

    def __init__(self, reader: PromptReader, folder: Path, shards: Mapping[str, PromptShard]) -> None:
        self.templates = reader.templates()
        self.task_index, self.copies = reader.dataset.task_index, reader.config.views + 1
        self._files = [safe_open(folder / name, "pt") for name in shards]
        sizes = [len(shard.frames) for shard in shards.values()]
        self._frames = np.concatenate([np.asarray(shard.frames) for shard in shards.values()])
        self._file = np.repeat(np.arange(len(sizes)), sizes)
        self._row = np.concatenate([np.arange(size) for size in sizes])

    def read(self, frames: IndexArray, views: IndexArray | None = None) -> list[TokenizedExample]:
        """Return the prompts of these dataset frames, which must be cached, in these views."""
        index = np.searchsorted(self._frames, frames)
        assert np.array_equal(self._frames[index], frames), "a frame has no cached vision features"
        rows = self._row[index] * self.copies + (views if views is not None else 0)
        return [
            replace(self.templates[self.task_index[frame]], features=StoredRow(self._files[file], int(row)))
            for frame, file, row in zip(frames, self._file[index], rows, strict=True)
        ]


def cache_prompts(
    hashed: HashedBackbone,
    dataset: EpisodeDataset,
    config: HiddenStateConfig,
    folder: Path,
    processes: Processes,
) -> CachedPrompts:
    """Compute the vision features of the frames that `folder` lacks, and open them.

    All of `processes` call this, and each computes a part. Raises BlmError, in every process, if
    the folder holds features of another model or dataset, or altered ones, or if the processes see
    different files.
    """
    spec = {**describe(hashed, dataset, config), "values": "vision features", "format": FORMAT}
    del spec["layer"], spec["precision"]
    cache = Cache(
        name="cache of vision features",
        folder=folder,
        spec=spec,
        shard=PromptShard,
        title=f"vision features of {dataset.space.robot}",
    )
    workers = FrameWorkers(hashed, dataset, config, partial(_open_writer, config=config))
    shards = fill_cache(cache, _units(dataset, config, folder), processes, workers)
    return CachedPrompts(PromptReader(hashed.backbone, dataset, config), folder, shards)


def _units(dataset: EpisodeDataset, config: HiddenStateConfig, folder: Path) -> list[WorkUnit]:
    frames = kept_frames(dataset.starts, config.stride)
    parts = np.split(frames, np.arange(config.shard_frames, len(frames), config.shard_frames))
    return [
        WorkUnit(name := f"{number:05d}.safetensors", (folder / name, part))
        for number, part in enumerate(parts)
    ]


def _open_writer(backbone: Backbone, dataset: EpisodeDataset, config: HiddenStateConfig) -> WriteShard:
    return PromptReader(backbone, dataset, config).write
