"""Prompts of frames with cached vision features: what a tuned backbone reads in every step.

    features/<dataset>/  spec.json  journal.jsonl  00000.safetensors 00001.safetensors ..

The vision tower is frozen, so its features of a frame are computed once; only the blocks of the
language model run in a step. All images of a dataset have one size, so each frame has the same
number of features. A text is tokenised once for each instruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from blm.backbone import Backbone, Inputs, control_prompt
from blm.datasets.lerobot import EpisodeDataset, open_dataset
from blm.datasets.mixture import IndexArray, kept_frames
from blm.io import replacing
from blm.jobs import Result, WorkUnit, run_units
from blm.training.caches.processes import journal_path, own_units, require_shared, wait_for_shards
from blm.training.loop.distributed import Processes
from blm.training.policy.hidden_state_cache import describe
from blm.training.policy.hidden_states import HiddenStateConfig, observed_images
from blm.training.run_inputs import require_same_facts, require_same_inputs, run_together
from blm.training.sft.tokenize import TokenizedExample, VisionInputs, vision_inputs_of
from blm.training.sft.vision_features import PictureFeatures, encode_pictures
from blm.types import ImageArray


@dataclass(frozen=True)
class PromptReader:
    """Reads the images of frames, and makes control prompts of them."""

    backbone: Backbone
    dataset: EpisodeDataset
    config: HiddenStateConfig

    def inputs(self, instructions: Sequence[str], images: Sequence[dict[str, ImageArray]]) -> Inputs:
        """Return the inputs of prompts on the CPU, padded on the right."""
        robot = self.dataset.space.robot
        prompts = [
            control_prompt(text, robot, views) for text, views in zip(instructions, images, strict=True)
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

    def __init__(self, reader: PromptReader, units: Sequence[WorkUnit]) -> None:
        self.templates = reader.templates()
        self.task_index, self.copies = reader.dataset.task_index, reader.config.views + 1
        self._files = [safe_open(unit.payload[0], "pt") for unit in units]
        self._frames = np.concatenate([unit.payload[1] for unit in units])
        sizes = [len(unit.payload[1]) for unit in units]
        self._file = np.repeat(np.arange(len(units)), sizes)
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
    backbone: Backbone,
    source: str,
    dataset: EpisodeDataset,
    config: HiddenStateConfig,
    folder: Path,
    processes: Processes,
) -> CachedPrompts:
    """Compute the vision features of the frames that `folder` lacks, and open them.

    `source` is the name or folder from which worker processes load `backbone`. All of `processes`
    call this, and each computes a part. Raises BlmError, in every process, if the folder holds
    features of another model or dataset, or if the processes see different files.
    """
    spec = {**describe(backbone, dataset, config), "values": "vision features"}
    del spec["layer"], spec["precision"]
    require_same_facts(processes, f"vision features '{folder}'", spec)

    def prepare() -> None:
        if processes.first:
            require_same_inputs(folder / "spec.json", spec, f"the vision features '{folder}' are stale")

    run_together(processes, prepare)
    require_shared(processes, folder)
    units = _units(dataset, config, folder)
    setup: dict[str, Any] = {"workers": 0}
    if config.workers and backbone.model.device.type == "cpu":
        setup = {"workers": config.workers, "setup": _set_up_worker}
        setup["setup_args"] = (source, backbone.model.dtype, dataset.folder, config)
    else:
        _worker[:] = [PromptReader(backbone, dataset, config)]
    if mine := own_units(units, folder, processes):
        title = f"vision features of {dataset.space.robot}"
        run_units(_write, mine, journal=journal_path(folder, processes.rank), title=title, **setup)
    _worker.clear()
    wait_for_shards(units, folder)
    return CachedPrompts(PromptReader(backbone, dataset, config), units)


def _units(dataset: EpisodeDataset, config: HiddenStateConfig, folder: Path) -> list[WorkUnit]:
    frames = kept_frames(dataset.starts, config.stride)
    parts = np.split(frames, np.arange(config.shard_frames, len(frames), config.shard_frames))
    return [
        WorkUnit(name := f"{number:05d}.safetensors", (folder / name, part))
        for number, part in enumerate(parts)
    ]


_worker: list[PromptReader] = []
"""The reader in this worker process; set by `_set_up_worker`."""


def _set_up_worker(source: str, dtype: torch.dtype, dataset: Path, config: HiddenStateConfig) -> None:
    backbone = Backbone.load(source, dtype=dtype)
    backbone.freeze()
    _worker[:] = [PromptReader(backbone, open_dataset(dataset), config)]


def _write(payload: tuple[Path, IndexArray]) -> Result:
    path, frames = payload
    reader = _worker[0]
    copies = reader.config.views + 1
    rows, views = np.repeat(frames, copies), np.tile(np.arange(copies), len(frames))
    size = reader.config.batch_size
    parts = [
        reader.features(rows[begin : begin + size], views[begin : begin + size])
        for begin in range(0, len(rows), size)
    ]
    with replacing(path) as temporary:
        save_file({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, temporary)
    return {"bytes": path.stat().st_size}
