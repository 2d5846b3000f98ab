"""Hidden-state cache: H_k of the frames of a dataset, computed once and memory-mapped.

    cache/  spec.json  journal.jsonl  00000.npy 00001.npy ..  manifest.json

A shard holds the hidden states of some whole episodes, [tokens, d], prompts one after another
without padding, in float16 or as compact codes (`quantization.py`). The future loss reads the frame
`future_steps` ahead from the same cache. Augmented views of a frame follow the frame itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from blm.backbone.backbone import Backbone
from blm.datasets.lerobot import EpisodeDataset
from blm.datasets.mixture import IndexArray, kept_frames
from blm.io import read_json
from blm.jobs import WorkUnit
from blm.training.caches.filling import Cache, fill_cache
from blm.training.loop.distributed import Processes
from blm.training.policy import augmentation
from blm.training.policy.cache_shards import CacheShard, ShardWriter, coding_error
from blm.training.policy.cache_workers import FrameWorkers, WriteShard
from blm.training.policy.hashed_backbone import HashedBackbone
from blm.training.policy.hidden_states import (
    CachePrecision,
    HiddenStateConfig,
    HiddenStateRows,
    LiveHiddenStates,
    require_precision,
)
from blm.training.policy.projection import describe_tokens
from blm.training.policy.quantization import TokenCodec, code_bytes
from blm.training.run_inputs import run_together
from blm.types import BlmError

FORMAT = 2
ALONE = Processes(0, 1, torch.device("cpu"))
"""A process without others."""


class CachedHiddenStates:
    """A `HiddenStateSource` that reads H_k from memory-mapped files, in float16 or as codes."""

    def __init__(
        self,
        folder: Path,
        shards: Mapping[str, CacheShard],
        config: HiddenStateConfig,
        codec: TokenCodec | None = None,
    ) -> None:
        self.config, self.codec = config, codec
        self._files = [np.load(folder / name, mmap_mode="r") for name in shards]
        lengths = [np.asarray(shard.lengths) for shard in shards.values()]
        self._frames = np.concatenate([np.asarray(shard.frames) for shard in shards.values()])
        self._shard = np.repeat(np.arange(len(lengths)), [len(x) for x in lengths])
        self._length = np.concatenate(lengths)
        self._stop = np.concatenate([np.cumsum(x) for x in lengths])

    def read(self, frames: IndexArray, views: IndexArray | None = None) -> HiddenStateRows:
        """Return H_k of the given dataset frames, which must be cached, or the codes that `codec`
        decodes; see `LiveHiddenStates.read`."""
        index = np.searchsorted(self._frames, frames)
        assert np.array_equal(self._frames[index], frames), "a frame is not in the hidden-state cache"
        index = index * (self.config.views + 1) + (views if views is not None else 0)
        return [self._files[self._shard[i]][self._stop[i] - self._length[i] : self._stop[i]] for i in index]


def cache_hidden_states(
    hashed: HashedBackbone,
    dataset: EpisodeDataset,
    config: HiddenStateConfig,
    folder: Path,
    processes: Processes = ALONE,
    codec: TokenCodec | None = None,
) -> CachedHiddenStates:
    """Fill the cache `folder`, or the missing part of it; check it, and open it.

    `codec` is that of `open_projection`. All of `processes` call this, and each computes a part of
    the shards. Raises BlmError, in every process, if the folder holds a cache with another spec or
    projection, or one that was altered, or if the processes see different files.
    """
    assert (codec is not None) == (config.precision == "compact")
    spec = describe(hashed, dataset, config, codec)

    def check() -> None:
        if processes.first:
            _require_same_coding(folder, spec)

    def report() -> None:
        _report_size(LiveHiddenStates(hashed.backbone, dataset, config), folder)

    run_together(processes, check)
    cache = Cache(
        name="hidden-state cache",
        folder=folder,
        spec=spec,
        shard=CacheShard,
        title=f"hidden states of {dataset.space.robot}",
    )
    writer = partial(_open_writer, config=config, codec=codec.path if codec is not None else None)
    workers = FrameWorkers(hashed, dataset, config, writer)
    shards = fill_cache(cache, list(_shards(dataset, config, folder)), processes, workers, report)
    if processes.first and (error := coding_error(shards.values())):
        Console(stderr=True).print(
            f"compact hidden states {folder}: RMS error {error.rms:.2%}, worst token {error.worst:.2%}, "
            f"smallest cosine {error.cosine:.5f}",
            soft_wrap=True,
        )
    return CachedHiddenStates(folder, shards, config, codec)


def _require_same_coding(folder: Path, spec: Mapping[str, Any]) -> None:
    """Raise BlmError for a cache of another projection, or of a precision that is no longer read."""
    path = folder / "spec.json"
    stored = read_json(path) if path.exists() else None
    if not isinstance(stored, dict):
        return
    theirs, ours = (one.get("projection") for one in (stored, spec))
    if theirs and ours and theirs != ours:
        raise BlmError(
            f"hidden-state cache '{folder}' was made with another projection ({theirs[:12]}, not "
            f"{ours[:12]}): all caches of a run share the projection.safetensors beside them. Put the "
            "file back with which this cache was made, name another folder, or move this cache away"
        )
    if stored.get("precision") != spec["precision"]:
        with _naming(folder):
            require_precision(str(stored.get("precision")))


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    try:
        yield
    except BlmError as error:
        raise BlmError(f"hidden-state cache '{folder}': {error}; move the folder away") from None


def describe(
    hashed: HashedBackbone,
    dataset: EpisodeDataset,
    config: HiddenStateConfig,
    codec: TokenCodec | None = None,
) -> dict[str, Any]:
    """Return all inputs that the cached values depend on, for spec.json."""
    return {
        "format": FORMAT,
        **describe_tokens(hashed, config),
        "stride": config.stride,
        "precision": config.precision,
        "views": config.views,
        "dataset": dataset.content_hash,
        **({"augmentation": augmentation.VERSION} if config.views else {}),
        **({"projection": codec.sha256, "explained": codec.explained} if codec is not None else {}),
    }


def cached_frame_bytes(tokens: float, hidden: int, *, precision: CachePrecision, dims: int) -> float:
    """Return the bytes of a frame of `tokens` tokens (after pooling) of size `hidden` in a cache."""
    return tokens * (code_bytes(hidden, dims) if precision == "compact" else 2 * hidden)


def _report_size(live: LiveHiddenStates, folder: Path) -> None:
    """Print the size of the cache on disk, computed from the prompt length of each instruction.

    Raises BlmError if the missing part does not fit.
    """
    dataset, side = live.dataset, live.dataset.image_size
    blank = np.zeros((len(dataset.instructions), side, side, 3), np.uint8)
    prompts = live.tap(dataset.instructions, dict.fromkeys(live.config.views_of_prompt, blank))
    kept = dataset.task_index[kept_frames(dataset.starts, live.config.stride)]
    tokens, width = np.array([len(row) for row in prompts])[kept], prompts[0].shape[1]
    precision, dims = live.config.precision, live.config.dims
    copies = live.config.views + 1
    frame = cached_frame_bytes(tokens.mean(), width, precision=precision, dims=dims)
    size, free = copies * len(kept) * frame / 1e9, shutil.disk_usage(folder).free / 1e9
    frames = f"{len(kept)} frames" + (f" x {copies} views" if copies > 1 else "")
    plan = f"{frames} x {tokens.mean():.0f} tokens x {width}, {precision}: {size:.3g} GB ({free:.3g} GB free)"
    Console(stderr=True).print(f"hidden-state cache {folder}: {plan}", soft_wrap=True)
    there = sum(path.stat().st_size for path in folder.glob("*.npy")) / 1e9
    if size - there > free:
        raise BlmError(
            f"hidden-state cache '{folder}' does not fit: {plan}; use a larger stride or another disk"
        )


def _shards(dataset: EpisodeDataset, config: HiddenStateConfig, folder: Path) -> Iterator[WorkUnit]:
    """Yield one work unit per shard of whole episodes, with their cached frames."""
    kept = kept_frames(dataset.starts, config.stride)
    episodes = np.split(kept, np.searchsorted(kept, dataset.starts[1:-1]))
    shard: list[IndexArray] = []
    number = 0
    for i, frames in enumerate(episodes, start=1):
        shard.append(frames)
        if sum(map(len, shard)) >= config.shard_frames or i == len(episodes):
            yield WorkUnit(name := f"{number:05d}.npy", (folder / name, shard))
            shard, number = [], number + 1


def _open_writer(
    backbone: Backbone, dataset: EpisodeDataset, config: HiddenStateConfig, codec: Path | None
) -> WriteShard:
    loaded = TokenCodec.load(codec)[0] if codec is not None else None
    return ShardWriter(LiveHiddenStates(backbone, dataset, config), loaded).write
