"""What can be wrong with an opened dataset. Opening raises the first fault; `blm doctor` lists them all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blm.data.dataset import VECTORS, EpisodeDataset
from blm.data.files import MANIFEST, PARTS, manifest_faults
from blm.data.foreign import MEND
from blm.data.stats import compute_stats
from blm.data.video import decodable_frames, probe
from blm.io import DamagedError, reading

RECOLLECT = "delete the dataset folder and collect again"
MANY_VIDEOS = 64
"""Of more videos a camera than this, opening a dataset checks only that they are there."""
SLACK = 0.1
"""Share of a control step by which a timestamp may be off."""


def opening_faults(dataset: EpisodeDataset) -> Iterator[DamagedError]:
    """The faults that make a dataset unusable, found without decoding or hashing a video."""
    yield from vector_faults(dataset)
    yield from video_faults(dataset)
    if "blm" in dataset.info and not dataset.manifest:
        yield DamagedError(f"'{dataset.folder / MANIFEST}' is missing")
    elif dataset.manifest:
        yield from manifest_faults(dataset.folder, dataset.manifest, quick=True)


def vector_faults(dataset: EpisodeDataset, every: bool = False) -> Iterator[DamagedError]:
    """Wrong shapes, order or times, values that are not finite, statistics of other frames.

    Of the statistics, count and extremes are compared; with `every`, which sorts all frames, the others too.
    """
    where, lengths = f"dataset '{dataset.folder}'", np.diff(dataset.starts)
    fix = RECOLLECT if dataset.manifest else MEND
    shape = (int(dataset.starts[-1]), dataset.space.dim)
    if not shape[0]:
        yield DamagedError(f"{where} has no frames", fix)
        return
    arrays = (dataset.states, dataset.actions, dataset.executed)
    for name, array in zip(VECTORS, arrays, strict=True):
        if array.shape != shape:
            yield DamagedError(
                f"{where}: {name} is {array.shape}, its episodes and action space need {shape}", fix
            )
        elif len(bad := np.flatnonzero(~np.isfinite(array).all(axis=1))):
            in_episodes = _named(dataset.episode_index[bad])
            yield DamagedError(f"{where}: {name} is not finite in {len(bad)} frames, {in_episodes}", fix)
        else:
            have = vars(dataset.stats[name])
            true = {"count": len(array), "min": array.min(axis=0), "max": array.max(axis=0)}
            true |= vars(compute_stats(array)) if every else {}
            if wrong := [key for key in true if not np.allclose(have[key], true[key], rtol=1e-4, atol=1e-6)]:
                yield DamagedError(
                    f"{where}: stats.json is not of these frames: {', '.join(wrong)} of {name}", fix
                )
    if not np.array_equal(dataset.episode_index, np.repeat(np.arange(len(lengths)), lengths)):
        yield DamagedError(f"{where}: frames are not ordered by episode as meta/episodes says", fix)
        return
    due = (np.arange(shape[0]) - np.repeat(dataset.starts[:-1], lengths)) / dataset.space.rate_hz
    late = np.abs(dataset.timestamps - due) > SLACK / dataset.space.rate_hz
    if late.any():
        yield DamagedError(
            f"{where}: timestamps are not those of {dataset.space.rate_hz:g} Hz in {late.sum()} frames, "
            f"{_named(dataset.episode_index[late])}",
            fix,
        )


def video_faults(dataset: EpisodeDataset, every: bool = False) -> Iterator[DamagedError]:
    """Videos that are missing or unreadable, or whose length, rate or size is wrong, by their headers."""
    lengths = np.diff(dataset.starts)
    for footage in dataset.footage.values():
        needs = np.zeros(len(footage.files), np.int64)
        np.maximum.at(needs, footage.file, footage.first + lengths)
        for path, need in zip(footage.files, needs.tolist(), strict=True):
            if not path.is_file():
                yield DamagedError(f"video '{path}' is missing")
            elif every or len(footage.files) <= MANY_VIDEOS:
                try:
                    yield from _probe_faults(dataset, path, need, footage.shape)
                except DamagedError as error:
                    yield error


def unreadable(folder: Path) -> Iterator[DamagedError]:
    """Files that cannot be parsed or decoded to their end, for a dataset without a manifest. Reads all."""
    for path in sorted(path for part in PARTS for path in (folder / part).rglob("[!.]*")):
        try:
            if path.suffix == ".mp4" and (good := decodable_frames(path)) < (listed := probe(path).frames):
                yield DamagedError(f"video '{path}': only {good} of {listed} frames can be decoded")
            elif path.suffix == ".parquet":
                with reading(path):
                    pq.read_table(path)
            elif path.suffix in (".json", ".jsonl"):
                with reading(path):
                    text = path.read_text()
                    for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
                        json.loads(part)
        except DamagedError as error:
            yield error


def _probe_faults(
    dataset: EpisodeDataset, path: Path, need: int, shape: tuple[int, int]
) -> Iterator[DamagedError]:
    have, rate = probe(path), dataset.space.rate_hz
    if have.frames < need or (dataset.manifest and have.frames != need):
        yield DamagedError(f"video '{path}' has {have.frames} frames, its episodes need {need}")
    if abs(have.rate * need / rate - need) > 0.5:
        yield DamagedError(f"video '{path}' has {have.rate:g} frames per second, its dataset has {rate:g}")
    if have.shape != shape:
        yield DamagedError(f"video '{path}' has pictures of {have.shape}, its dataset has {shape}")


def _named(episodes: NDArray[np.int64]) -> str:
    """'in episodes 1, 2, 7', at most eight of them."""
    numbers = np.unique(episodes).tolist()
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"in episodes {', '.join(map(str, numbers[:8]))}{more}"
