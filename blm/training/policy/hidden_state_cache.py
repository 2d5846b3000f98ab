"""Hidden-state cache: H_k of the frames of a dataset, computed once and memory-mapped.

    cache/  spec.json  journal.jsonl  00000.npy 00001.npy ..  manifest.json

A shard holds the hidden states of some whole episodes, [tokens, d], prompts one after another
without padding, in float16, or in int8 with one scale a token. spec.json records everything that
H_k depends on; a cache with another spec, or with a changed shard, is refused. The future loss
reads the frame `future_steps` ahead from the same cache. Augmented views of a frame follow the
frame itself.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from blm.backbone.backbone import Backbone
from blm.datasets.lerobot import EpisodeDataset, open_dataset
from blm.datasets.mixture import IndexArray, kept_frames
from blm.io import replacing, sha256_file, write_json
from blm.jobs import Result, WorkUnit, run_units
from blm.policy.codec import prompt_version
from blm.training.loop.distributed import Processes
from blm.training.policy.cache_processes import (
    journal_path,
    own_units,
    require_shared,
    wait_for_manifest,
    wait_for_shards,
)
from blm.training.policy.hidden_states import HiddenStateConfig, HiddenStateRows, LiveHiddenStates
from blm.training.policy.quantization import dequantize_int8, quantize_int8
from blm.training.run_inputs import require_same_facts, require_same_inputs, run_together
from blm.types import BlmError

FORMAT = 2
SAMPLE_BLOCKS = 16
"""Blocks of a shard that are hashed when a filled cache is opened."""
SAMPLE_BYTES = 65_536
"""Size of such a block."""
ALONE = Processes(0, 1, torch.device("cpu"))
"""A process without others."""


@dataclass(frozen=True, kw_only=True)
class CacheShard:
    """A file of the cache, as the manifest describes it."""

    frames: Sequence[int]
    """Dataset frames, in order."""
    lengths: Sequence[int]
    """Tokens of each row of hidden states; a frame has one row per view."""
    sha256: str
    error: float | None = None
    """RMS error of int8 values relative to the RMS of the values; None for float16."""
    bytes: int = 0
    """Size of the file."""
    sample_sha256: str = ""
    """Hash of blocks of the file, see `_sample_sha256`; empty in caches of older versions."""


class CachedHiddenStates:
    """A `HiddenStateSource` that reads H_k from memory-mapped files, as float16."""

    def __init__(self, folder: Path, shards: Mapping[str, CacheShard], config: HiddenStateConfig) -> None:
        self.config, self._files = config, [np.load(folder / name, mmap_mode="r") for name in shards]
        lengths = [np.asarray(shard.lengths) for shard in shards.values()]
        self._frames = np.concatenate([np.asarray(shard.frames) for shard in shards.values()])
        self._shard = np.repeat(np.arange(len(lengths)), [len(x) for x in lengths])
        self._length = np.concatenate(lengths)
        self._stop = np.concatenate([np.cumsum(x) for x in lengths])

    def read(self, frames: IndexArray, views: IndexArray | None = None) -> HiddenStateRows:
        """Return H_k of the given dataset frames, which must be cached; see
        `LiveHiddenStates.read`."""
        index = np.searchsorted(self._frames, frames)
        assert np.array_equal(self._frames[index], frames), "a frame is not in the hidden-state cache"
        index = index * (self.config.views + 1) + (views if views is not None else 0)
        stored = (self._files[self._shard[i]][self._stop[i] - self._length[i] : self._stop[i]] for i in index)
        return [dequantize_int8(row) if self.config.precision == "int8" else row for row in stored]


def cache_hidden_states(
    backbone: Backbone,
    source: str,
    dataset: EpisodeDataset,
    config: HiddenStateConfig,
    folder: Path,
    processes: Processes = ALONE,
) -> CachedHiddenStates:
    """Fill the cache `folder`, or the missing part of it; check it, and open it.

    `source` is the name or folder from which worker processes load `backbone`. All of `processes`
    call this, and each computes a part of the shards. Raises BlmError, in every process, if the
    folder holds a cache with another spec, or one that was altered, or if the processes see
    different files.
    """
    spec = describe(backbone, dataset, config)
    manifest = folder / "manifest.json"

    def prepare() -> None:
        if processes.first:
            require_same_inputs(folder / "spec.json", spec, f"hidden-state cache '{folder}' is stale")
            if not manifest.exists():
                _report_size(LiveHiddenStates(backbone, dataset, config), folder)

    require_same_facts(processes, f"hidden-state cache '{folder}'", spec)
    run_together(processes, prepare)
    require_shared(processes, folder)
    if not manifest.exists():
        _fill(backbone, source, dataset, config, folder, processes)
    shards = {name: CacheShard(**shard) for name, shard in json.loads(manifest.read_text()).items()}
    run_together(processes, lambda: _require_unaltered(folder, shards))
    if errors := [shard.error for shard in shards.values() if shard.error is not None]:
        Console(stderr=True).print(
            f"int8 hidden states: RMS error {np.mean(errors):.2%} of the values' own RMS"
        )
    return CachedHiddenStates(folder, shards, config)


def _fill(
    backbone: Backbone,
    source: str,
    dataset: EpisodeDataset,
    config: HiddenStateConfig,
    folder: Path,
    processes: Processes,
) -> None:
    """Compute the missing shards of this process, and wait for those of the others."""
    units = list(_shards(dataset, config, folder))
    setup: dict[str, Any] = {"workers": config.workers}
    if config.workers and backbone.model.device.type == "cpu":
        setup["setup"] = _set_up_worker
        setup["setup_args"] = (
            source,
            backbone.model.dtype,
            backbone.attn_implementation,
            dataset.folder,
            config,
        )
    else:  # further processes would hold further copies of the backbone on the same GPU
        setup["workers"] = 0
        _worker[:] = [LiveHiddenStates(backbone, dataset, config)]
    if mine := own_units(units, folder, processes):
        part = f", process {processes.rank} of {processes.count}" if processes.count > 1 else ""
        title = f"hidden states of {dataset.space.robot}{part}"
        run_units(_write_shard, mine, journal=journal_path(folder, processes.rank), title=title, **setup)
    _worker.clear()
    if processes.first:
        write_json(folder / "manifest.json", wait_for_shards(units, folder))
    else:
        wait_for_manifest(folder)


def _require_unaltered(folder: Path, shards: Mapping[str, CacheShard]) -> None:
    """Raise BlmError for a shard that is missing or altered, by its size and by samples of it.

    The whole file was hashed when it was written. Caches of older versions have no samples and are
    hashed again.
    """
    for name, shard in shards.items():
        path = folder / name
        if not path.exists():
            same = False
        elif shard.sample_sha256:
            same = (path.stat().st_size, _sample_sha256(path)) == (shard.bytes, shard.sample_sha256)
        else:
            same = sha256_file(path) == shard.sha256
        if not same:
            raise BlmError(
                f"hidden-state cache '{folder}': {name} is missing or altered; "
                "move the folder away, run again"
            )


def _sample_sha256(path: Path) -> str:
    """Return the sha256 of blocks at the beginning, at the end and evenly between; of a small file,
    all of it is hashed."""
    size = path.stat().st_size
    if size <= SAMPLE_BLOCKS * SAMPLE_BYTES:
        return sha256_file(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in np.linspace(0, size - SAMPLE_BYTES, SAMPLE_BLOCKS).astype(int).tolist():
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def describe(backbone: Backbone, dataset: EpisodeDataset, config: HiddenStateConfig) -> dict[str, Any]:
    """Return all inputs that the cached values depend on, for spec.json."""
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


def _report_size(live: LiveHiddenStates, folder: Path) -> None:
    """Print the size of the cache on disk, computed from the prompt length of each instruction.

    Raises BlmError if the missing part does not fit.
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


_worker: list[LiveHiddenStates] = []
"""The source of hidden states in this worker process; set by `_set_up_worker`."""


def _set_up_worker(
    source: str,
    dtype: torch.dtype,
    attn_implementation: str | None,
    dataset: Path,
    config: HiddenStateConfig,
) -> None:
    backbone = Backbone.load(
        source, dtype=dtype, attn_implementation=attn_implementation, blocks=config.layer
    )
    _worker[:] = [LiveHiddenStates(backbone, open_dataset(dataset), config)]


def _write_shard(payload: tuple[Path, list[IndexArray]]) -> Result:
    path, episodes = payload
    live = _worker[0]
    copies = live.config.views + 1
    rows = [
        row
        for frames in episodes
        for row in live.read(np.repeat(frames, copies), np.tile(np.arange(copies), len(frames)))
    ]
    values = np.concatenate(rows)
    rounding = dict[str, float]()
    if live.config.precision == "int8":
        stored: NDArray[Any] = quantize_int8(values)
        error = dequantize_int8(stored).astype(np.float32) - values
        rounding["error"] = float(np.sqrt(np.mean(error**2) / np.mean(values.astype(np.float32) ** 2)))
    else:
        with np.errstate(over="ignore"):
            stored = values.astype(np.float16)
    if not np.isfinite(stored).all() or not np.isfinite(values).all():
        raise BlmError(f"hidden states at layer {live.config.layer} exceed float16; train without a cache")
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, stored)
    frames = np.concatenate(episodes).tolist()
    return {
        "frames": frames,
        "lengths": [len(row) for row in rows],
        "sha256": sha256_file(path),
        **rounding,
        "bytes": path.stat().st_size,
        "sample_sha256": _sample_sha256(path),
    }
