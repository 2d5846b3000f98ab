"""The projection of compact hidden-state caches: fitted once, and the same for all datasets of a run.

    caches/  projection.safetensors  panda/  xarm6/ ..

The file is made by the first run, from a sample of the tokens of its datasets, and never made anew:
caches that further runs add beside it use it as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from blm.backbone.backbone import Backbone
from blm.datasets.lerobot import EpisodeDataset
from blm.datasets.mixture import IndexArray, kept_frames
from blm.policy.codec import prompt_version
from blm.training.caches.processes import wait_for_file
from blm.training.loop.distributed import Processes
from blm.training.policy.hashed_backbone import HashedBackbone
from blm.training.policy.hidden_states import HiddenStateConfig, LiveHiddenStates
from blm.training.policy.quantization import TokenCodec
from blm.training.run_inputs import run_together
from blm.types import BlmError

FILE = "projection.safetensors"
SAMPLE_FRAMES = 256
"""Frames, of all datasets together, whose tokens a projection is fitted to."""


def describe_tokens(hashed: HashedBackbone, config: HiddenStateConfig) -> dict[str, Any]:
    """Return what hidden states depend on, apart from the dataset."""
    backbone = hashed.backbone
    return {
        "backbone": hashed.weights,
        "prompt": prompt_version(backbone, config.views_of_prompt, config.prompt),
        "image_processing": json.loads(backbone.processor.image_processor.to_json_string()),
        "layer": config.layer,
        "cameras": list(config.cameras),
        **({"pool": config.pool} if config.pool > 1 else {}),
        **({"prompt_order": config.prompt} if config.prompt != "pictures_first" else {}),
    }


def open_projection(
    hashed: HashedBackbone,
    datasets: Sequence[EpisodeDataset],
    config: HiddenStateConfig,
    folder: Path,
    processes: Processes,
) -> TokenCodec | None:
    """Return the codec of the caches in `folder`; None if they are not compact.

    If the folder has none, process 0 fits one to tokens of `datasets`. All of `processes` call
    this. Raises BlmError, in every process, if that of the folder is for other hidden states or
    dims.
    """
    if config.precision != "compact":
        return None
    path, backbone = folder / FILE, hashed.backbone
    inputs = {**describe_tokens(hashed, config), "dims": min(config.dims, backbone.hidden_size)}

    def prepare() -> TokenCodec | None:
        if not processes.first:
            return None
        if not path.exists():
            codec = TokenCodec.fit(_sample(backbone, datasets, config), config.dims)
            codec.save(path, inputs)
            _report(codec, path)
        return _load(path, inputs)

    mine = run_together(processes, prepare)
    sha256 = processes.gather_objects(mine.sha256 if mine is not None else "")[0]

    def open_shared() -> TokenCodec:
        wait_for_file(path, sha256)
        return TokenCodec.load(path)[0]

    return run_together(processes, lambda: open_shared() if mine is None else mine)


def _load(path: Path, inputs: dict[str, Any]) -> TokenCodec:
    """Return the codec in a file. Raises BlmError if it was made from other inputs."""
    codec, stored = TokenCodec.load(path)
    wanted = json.loads(json.dumps(inputs))
    if other := [name for name in {**wanted, **stored} if wanted.get(name) != stored.get(name)]:
        found = ", ".join(f"{name} ({stored[name]})" if name == "dims" else name for name in other)
        raise BlmError(
            f"'{path}' was made for another {found}; name another folder for the caches, or move this one "
            "away"
        )
    return codec


def _report(codec: TokenCodec, path: Path) -> None:
    Console(stderr=True).print(
        f"compact hidden states: {codec.dims} of {len(codec.mean)} channels hold {codec.explained:.2%} of "
        f"the variance ({path})",
        soft_wrap=True,
    )


def _sample(
    backbone: Backbone, datasets: Sequence[EpisodeDataset], config: HiddenStateConfig
) -> Iterator[Tensor]:
    """Yield hidden states of sampled frames, in batches [n, d] on the device of the backbone."""
    each = math.ceil(SAMPLE_FRAMES / len(datasets))
    for dataset in datasets:
        live = LiveHiddenStates(backbone, dataset, config)
        frames = sample_frames(dataset, config.stride, each)
        for start in range(0, len(frames), config.batch_size):
            rows = np.concatenate(live.read(frames[start : start + config.batch_size]))
            yield torch.from_numpy(rows).to(backbone.model.device)


def sample_frames(dataset: EpisodeDataset, stride: int, count: int) -> IndexArray:
    """Return `count` of the cached frames at random, spread evenly over the instructions, sorted.

    Words of a rare instruction would be coded badly if the sample did not have them.
    """
    frames = np.random.default_rng(0).permutation(kept_frames(dataset.starts, stride))
    turn = np.zeros(len(frames), np.int64)
    for task in np.unique(dataset.task_index[frames]):
        mine = np.flatnonzero(dataset.task_index[frames] == task)
        turn[mine] = np.arange(len(mine))
    return np.sort(frames[np.argsort(turn, kind="stable")[:count]])
