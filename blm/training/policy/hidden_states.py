"""The intents of a dataset: H_k of its frames, computed once and memory-mapped, or anew for every batch.

    cache/  spec.json  journal.jsonl  00000.npy 00001.npy ..  manifest.json

A shard holds the hidden states of some whole episodes, [tokens, d], prompts one after another, unpadded: in
float16, or in int8 with one scale a token. spec.json names everything that H_k depends on; a cache of another
spec, or with a changed shard, is refused. The frame that the future loss looks at is a row of the same store
and costs no pass of its own. Augmented views of a frame follow the frame itself.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from blm.backbone.backbone import Backbone
from blm.backbone.prompt import control_prompt
from blm.datasets.lerobot import EpisodeDataset, open_dataset
from blm.datasets.mixture import IndexArray, kept_frames
from blm.io import read_json, replacing, sha256_file, write_json
from blm.jobs import MAX_WORKERS, Result, Unit, run_units
from blm.policy.policy import prompt_version
from blm.types import BlmError, ImageArray, require_numbers

FORMAT = 2
Rows = list[NDArray[np.floating[Any]]]
"""Hidden states [L_i, d] of some frames; prompts differ in length."""


@dataclass(frozen=True, kw_only=True)
class HiddenStateConfig:
    layer: int
    """k, the block (from 1) of the language model whose output is tapped."""
    cameras: tuple[str, ...]
    stride: int = 1
    """Keep every n-th frame of an episode, and its last; n must divide the policy's `future_steps`."""
    batch_size: int = 32
    """Frames in one forward pass."""
    workers: int = 2
    """Processes that fill a cache; 0: this process."""
    shard_frames: int = 256
    """A shard ends with the episode that reaches this number of kept frames."""
    precision: Literal["float16", "int8"] = "float16"
    """Of cached values. int8 takes half the space; its error is measured and stored in the manifest."""
    views: int = 0
    """Augmented views of each frame (other light, shifted pictures) that are cached beside the frame."""

    def __post_init__(self) -> None:
        most = dict.fromkeys(("layer", "stride", "batch_size", "shard_frames"), (1, 10**9))
        require_numbers(self, **most, views=(0, 1000), workers=(0, MAX_WORKERS))
        sizes = (self.layer, self.stride, self.batch_size, self.shard_frames, self.views + 1)
        if min(sizes) < 1 or not self.cameras:
            raise BlmError(f"intents: need a layer, cameras and positive sizes, got {self}")


class LiveHiddenStates:
    """Computes H_k anew for each call; needs no disk, but the backbone in memory."""

    def __init__(self, backbone: Backbone, dataset: EpisodeDataset, config: HiddenStateConfig) -> None:
        self.backbone, self.dataset, self.config = backbone, dataset, config

    def rows(self, frames: IndexArray, views: IndexArray | None = None) -> Rows:
        """Return H_k of the given dataset frames, each in the view of this number; 0 is the frame itself."""
        images = {camera: self.dataset.frames(frames, camera) for camera in self.config.cameras}
        if views is not None:
            images = augmented(images, frames, views)
        return self.tap([self.dataset.instructions[t] for t in self.dataset.task_index[frames]], images)

    def tap(self, instructions: Sequence[str], images: Mapping[str, ImageArray]) -> Rows:
        """Return H_k of control prompts: n texts, and for each camera pictures [n, height, width, 3]."""
        prompts = [
            control_prompt(text, self.dataset.space.robot, {camera: images[camera][i] for camera in images})
            for i, text in enumerate(instructions)
        ]
        rows: Rows = []
        for start in range(0, len(prompts), self.config.batch_size):
            inputs = self.backbone.read(prompts[start : start + self.config.batch_size], side="right")
            tapped = self.backbone.tap(self.backbone.place(inputs), self.config.layer)
            hidden, mask = tapped.hidden.float().cpu(), inputs["attention_mask"].bool()
            rows += [h[m].numpy() for h, m in zip(hidden, mask, strict=True)]
        return rows


class CachedHiddenStates:
    """Reads H_k from a cache of memory-mapped files, as float16."""

    def __init__(self, folder: Path, shards: Mapping[str, Result], config: HiddenStateConfig) -> None:
        self.config, self._files = config, [np.load(folder / name, mmap_mode="r") for name in shards]
        lengths = [np.asarray(shard["lengths"]) for shard in shards.values()]
        self._frames = np.concatenate([np.asarray(shard["frames"]) for shard in shards.values()])
        self._shard = np.repeat(np.arange(len(lengths)), [len(x) for x in lengths])
        self._length = np.concatenate(lengths)
        self._stop = np.concatenate([np.cumsum(x) for x in lengths])

    def rows(self, frames: IndexArray, views: IndexArray | None = None) -> Rows:
        """Return H_k of the given dataset frames, which must be kept ones; see `LiveHiddenStates.rows`."""
        at = np.searchsorted(self._frames, frames)
        assert np.array_equal(self._frames[at], frames), "a frame without intents was asked for"
        at = at * (self.config.views + 1) + (views if views is not None else 0)
        stored = (self._files[self._shard[i]][self._stop[i] - self._length[i] : self._stop[i]] for i in at)
        return [unpacked(row) if self.config.precision == "int8" else row for row in stored]


def packed(hidden: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """[tokens, d] -> bytes [tokens, d + 4]: values in 254 equal steps of the token's range, its scale.

    The error of a value is at most 1/254 of the largest one of its token.
    """
    scale = np.maximum(np.abs(hidden).max(-1, keepdims=True), 1e-12).astype(np.float32) / 127
    values = np.round(hidden / scale).astype(np.int8)
    return np.concatenate([values.view(np.uint8), scale.view(np.uint8)], axis=-1)


def unpacked(stored: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Undo `packed`."""
    values, scale = stored[:, :-4].view(np.int8), np.ascontiguousarray(stored[:, -4:]).view(np.float32)
    return (values * scale).astype(np.float16)


def augmented(
    images: Mapping[str, ImageArray], frames: IndexArray, views: IndexArray
) -> dict[str, ImageArray]:
    """Change the pictures of frames whose view is not 0, each as its frame and view say.

    Light and contrast by up to 30 %, each colour by up to 10 %, and a shift by up to 3 % of the side, the
    border repeated (about the choices of GR00T N1.5, without what would hide small things).
    """
    changed = {camera: pictures.copy() for camera, pictures in images.items()}
    for place in np.flatnonzero(views):
        rng = np.random.default_rng((int(frames[place]), int(views[place])))
        gain, contrast = rng.uniform(0.7, 1.3) * rng.uniform(0.9, 1.1, 3), rng.uniform(0.7, 1.3)
        for pictures in changed.values():
            picture = pictures[place].astype(np.float32)
            picture = ((picture - picture.mean()) * contrast + picture.mean()) * gain
            most = round(0.03 * picture.shape[0])
            down, right = rng.integers(0, 2 * most + 1, 2)
            padded = np.pad(picture, ((most, most), (most, most), (0, 0)), mode="edge")
            shifted = padded[down : down + picture.shape[0], right : right + picture.shape[1]]
            pictures[place] = shifted.clip(0, 255).round().astype(np.uint8)
    return changed


def collate(rows: Rows) -> tuple[Tensor, Tensor]:
    """Pad ragged rows on the right: hidden [B, L, d] in their precision, and mask [B, L]."""
    lengths = np.array([len(row) for row in rows])
    hidden = np.zeros((len(rows), lengths.max(), rows[0].shape[1]), rows[0].dtype)
    for padded, row in zip(hidden, rows, strict=True):
        padded[: len(row)] = row
    return torch.from_numpy(hidden), torch.from_numpy(np.arange(hidden.shape[1]) < lengths[:, None])


def cache_hidden_states(
    backbone: Backbone, source: str, dataset: EpisodeDataset, config: HiddenStateConfig, folder: Path
) -> CachedHiddenStates:
    """Fill the cache `folder` as far as it is not yet, check it, and open it.

    `source` is the name or folder that worker processes load `backbone` from. Raises BlmError if the folder
    holds a cache of anything else, or one that was altered.
    """
    claim(folder / "spec.json", describe(backbone, dataset, config), f"intent cache '{folder}' is stale")
    manifest = folder / "manifest.json"
    if not manifest.exists():
        _announce(LiveHiddenStates(backbone, dataset, config), folder)
        results = run_units(
            _write_shard,
            list(_shards(dataset, config, folder)),
            journal=folder / "journal.jsonl",
            workers=config.workers,
            title=f"intents of {dataset.space.robot}",
            setup=_set_up_worker,
            setup_args=(source, str(backbone.model.device), backbone.model.dtype, dataset.folder, config),
        )
        _worker.clear()
        write_json(manifest, results)
    shards: dict[str, Result] = json.loads(manifest.read_text())
    for name, shard in shards.items():
        if not (folder / name).exists() or sha256_file(folder / name) != shard["sha256"]:
            raise BlmError(
                f"intent cache '{folder}': {name} is missing or altered; move the folder away, run again"
            )
    if errors := [shard["error"] for shard in shards.values() if "error" in shard]:
        Console(stderr=True).print(f"int8 intents: RMS error {np.mean(errors):.2%} of the values' own RMS")
    return CachedHiddenStates(folder, shards, config)


def describe(backbone: Backbone, dataset: EpisodeDataset, config: HiddenStateConfig) -> dict[str, Any]:
    """Return everything that the cached values depend on."""
    return {
        "format": FORMAT,
        "backbone": backbone.fingerprint(),
        "prompt": prompt_version(backbone, config.cameras),
        "image_processing": json.loads(backbone.processor.image_processor.to_json_string()),
        "layer": config.layer,
        "cameras": list(config.cameras),
        "stride": config.stride,
        "precision": config.precision,
        "views": config.views,
        "dataset": dataset.content_hash,
    }


def claim(path: Path, facts: Mapping[str, Any], complaint: str) -> None:
    """Write what a new folder is made from, with its sha256.

    Raises BlmError if that was something else, and for a folder of unknown origin with files that training
    would go on from, replace or remove.
    """
    text = json.dumps(facts, sort_keys=True)
    mine = {**json.loads(text), "key": hashlib.sha256(text.encode()).hexdigest()}
    ours = ("log.jsonl", "manifest.json", "journal.jsonl", "state-*.safetensors", "best.safetensors", "*.npy")
    made = sorted({found.name for name in ours for found in path.parent.glob(name)})
    if path.exists():
        there = read_json(path)
        there = there if isinstance(there, dict) else {}
        if there == mine:
            return
        if made:
            other = ", ".join(name for name in facts if there.get(name) != mine[name])
            raise BlmError(
                f"{complaint}: made from another {other}; name another folder, or move this one away"
            )
    elif made:
        raise BlmError(
            f"'{path.parent}' has {', '.join(made[:3])} but no {path.name}: this program did not begin it; "
            "name another folder"
        )
    write_json(path, mine)


def _announce(live: LiveHiddenStates, folder: Path) -> None:
    """Print the size on disk, from the prompt length per instruction.

    Raises BlmError if what is not there yet does not fit.
    """
    dataset, side = live.dataset, live.dataset.image_size
    blank = np.zeros((len(dataset.instructions), side, side, 3), np.uint8)
    prompts = live.tap(dataset.instructions, dict.fromkeys(live.config.cameras, blank))
    kept = dataset.task_index[kept_frames(dataset.starts, live.config.stride)]
    tokens, width = np.array([len(row) for row in prompts])[kept], prompts[0].shape[1]
    bytes_each = width + 4 if live.config.precision == "int8" else 2 * width
    copies = live.config.views + 1
    size, free = copies * tokens.sum() * bytes_each / 1e9, shutil.disk_usage(folder).free / 1e9
    frames = f"{len(kept)} frames" + (f" x {copies} views" if copies > 1 else "")
    plan = f"{frames} x {tokens.mean():.0f} tokens x {width}: {size:.3g} GB ({free:.3g} GB free)"
    Console(stderr=True).print(f"intent cache {folder}: {plan}", soft_wrap=True)
    there = sum(path.stat().st_size for path in folder.glob("*.npy")) / 1e9
    if size - there > free:
        raise BlmError(f"intent cache '{folder}' does not fit: {plan}; use a larger stride or another disk")


def _shards(dataset: EpisodeDataset, config: HiddenStateConfig, folder: Path) -> Iterator[Unit]:
    """Yield shards of consecutive whole episodes, with the kept frames of each episode."""
    kept = kept_frames(dataset.starts, config.stride)
    episodes = np.split(kept, np.searchsorted(kept, dataset.starts[1:-1]))
    shard: list[IndexArray] = []
    number = 0
    for i, frames in enumerate(episodes, start=1):
        shard.append(frames)
        if sum(map(len, shard)) >= config.shard_frames or i == len(episodes):
            yield Unit(name := f"{number:05d}.npy", (folder / name, shard))
            shard, number = [], number + 1


_worker: list[LiveHiddenStates] = []
"""What this worker process computes with; filled by `_set_up_worker`."""


def _set_up_worker(
    source: str, device: str, dtype: torch.dtype, dataset: Path, config: HiddenStateConfig
) -> None:
    backbone = Backbone.load(source, device=device, dtype=dtype)
    _worker[:] = [LiveHiddenStates(backbone, open_dataset(dataset), config)]


def _write_shard(payload: tuple[Path, list[IndexArray]]) -> Result:
    path, episodes = payload
    live = _worker[0]
    copies = live.config.views + 1
    rows = [
        row
        for frames in episodes
        for row in live.rows(np.repeat(frames, copies), np.tile(np.arange(copies), len(frames)))
    ]
    values, result = np.concatenate(rows), dict[str, Any]()
    if live.config.precision == "int8":
        stored: NDArray[Any] = packed(values)
        off = unpacked(stored).astype(np.float32) - values
        result["error"] = float(np.sqrt(np.mean(off**2) / np.mean(values.astype(np.float32) ** 2)))
    else:
        with np.errstate(over="ignore"):
            stored = values.astype(np.float16)
    if not np.isfinite(stored).all() or not np.isfinite(values).all():
        raise BlmError(f"hidden states at layer {live.config.layer} exceed float16; train without a cache")
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, stored)
    frames = np.concatenate(episodes).tolist()
    return {"frames": frames, "lengths": [len(row) for row in rows], "sha256": sha256_file(path), **result}
