"""Checks of an opened dataset.

Opening a dataset raises the first fault; `blm doctor` lists all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blm.datasets.dataset import VECTORS, EpisodeDataset
from blm.datasets.files import MANIFEST, PARTS, ProgressIterator, manifest_faults, no_progress
from blm.datasets.lerobot_columns import features_of
from blm.datasets.lerobot_layouts import REWRITE
from blm.datasets.statistics import compute_stats
from blm.datasets.video import decodable_frames, frame_times, probe
from blm.io import DamagedError, reading, require_no_pointer
from blm.types import BlmError

RECOLLECT = "move the dataset folder away and collect again"
EVEN = (
    'if the frames are evenly spaced, state "clock": "frame_index" in a mapping '
    "(blm doctor {folder} --suggest)"
)
MAX_PROBED_VIDEOS = 64
"""Maximum number of videos per camera to probe on opening; of more, only existence is checked."""
MAX_CHECKED_EPISODES = 200
"""Maximum number of episodes whose images are compared."""
MOVED_SHARE = 0.05
"""Fraction of its range in the dataset that a joint must cover for its arm to count as moved."""
CODEC_NOISE = 8
"""Difference between two encodings of the same image [levels of 255]."""
TIMESTAMP_TOLERANCE = 0.1
"""Maximum error of a timestamp, as a fraction of a control step."""


def opening_faults(dataset: EpisodeDataset) -> Iterator[DamagedError]:
    """Yield the faults that make a dataset unusable. No video is decoded or hashed."""
    yield from vector_faults(dataset)
    yield from video_faults(dataset)
    if "blm" in dataset.info and not dataset.manifest:
        yield DamagedError(f"'{dataset.folder / MANIFEST}' is missing")
    elif dataset.manifest:
        yield from manifest_faults(dataset.folder, dataset.manifest, quick=True)


def vector_faults(dataset: EpisodeDataset, every: bool = False) -> Iterator[DamagedError]:
    """Yield wrong shapes, orders, timestamps, statistics, and values that are not finite.

    Of the statistics, count and extremes are compared; with `every`, also the others, which
    requires sorting all frames.
    """
    where, lengths = f"dataset '{dataset.folder}'", np.diff(dataset.starts)
    fix = RECOLLECT if dataset.manifest else REWRITE
    frames, dim = int(dataset.starts[-1]), dataset.space.dim
    if not frames:
        yield DamagedError(f"{where} has no frames", fix)
        return
    arrays = (dataset.states, dataset.actions, dataset.executed)
    for name, array, size in zip(VECTORS, arrays, (dataset.space.state_dim, dim, dim), strict=True):
        shape = (frames, size)
        if array.shape != shape:
            yield DamagedError(
                f"{where}: {name} is {array.shape}, its episodes and action space need {shape}", fix
            )
        elif len(bad := np.flatnonzero(~np.isfinite(array).all(axis=1))):
            in_episodes = _list_episodes(dataset.episode_index[bad])
            yield DamagedError(f"{where}: {name} is not finite in {len(bad)} frames, {in_episodes}", fix)
        else:
            have = vars(dataset.stats[name])
            true = {"count": len(array), "min": array.min(axis=0), "max": array.max(axis=0)}
            true |= vars(compute_stats(array)) if every else {}
            if wrong := [key for key in true if not np.allclose(have[key], true[key], rtol=1e-4, atol=1e-6)]:
                yield DamagedError(
                    f"{where}: stats.json does not belong to these frames: {', '.join(wrong)} of {name}", fix
                )
    if not np.array_equal(dataset.episode_index, np.repeat(np.arange(len(lengths)), lengths)):
        yield DamagedError(f"{where}: frames are not in the order of meta/episodes", fix)
        return
    due = (np.arange(frames) - np.repeat(dataset.starts[:-1], lengths)) / dataset.space.rate_hz
    late = np.abs(dataset.timestamps - due) > TIMESTAMP_TOLERANCE / dataset.space.rate_hz
    if late.any():
        yield DamagedError(
            f"{where}: timestamps are not those of {dataset.space.rate_hz:g} Hz in {late.sum()} frames, "
            f"{_list_episodes(dataset.episode_index[late])}",
            fix if dataset.manifest else EVEN.format(folder=dataset.folder),
        )


def video_faults(dataset: EpisodeDataset, every: bool = False) -> Iterator[DamagedError]:
    """Yield missing, unreadable and inconsistent videos, judged by their headers."""
    lengths = np.diff(dataset.starts)
    for camera, camera_videos in dataset.camera_videos.items():
        if every:
            yield from _gap_faults(dataset, camera, lengths)
        needs = np.zeros(len(camera_videos.files), np.int64)
        np.maximum.at(needs, camera_videos.file, camera_videos.first + lengths)
        for path, need in zip(camera_videos.files, needs.tolist(), strict=True):
            if not path.is_file():
                yield DamagedError(f"video '{path}' is missing")
            elif every or len(camera_videos.files) <= MAX_PROBED_VIDEOS:
                try:
                    yield from _probe_faults(dataset, path, need, camera_videos.shape, every)
                except DamagedError as error:
                    yield error


def _gap_faults(dataset: EpisodeDataset, camera: str, lengths: NDArray[np.int64]) -> Iterator[DamagedError]:
    """Yield episodes that overlap in a video, or in our datasets leave unused frames between them.

    Editors of LeRobotDatasets leave the frames of deleted episodes in the videos.
    """
    camera_videos = dataset.camera_videos[camera]
    for number, path in enumerate(camera_videos.files):
        mine = np.flatnonzero(camera_videos.file == number)
        mine = mine[np.argsort(camera_videos.first[mine], kind="stable")]
        due = np.concatenate([[0], (camera_videos.first[mine] + lengths[mine])[:-1]])
        off = camera_videos.first[mine] - due
        if len(wrong := np.flatnonzero(off if dataset.manifest else off < 0)):
            first = wrong[0]
            yield DamagedError(
                f"video '{path}': episode {mine[first]} starts at frame {camera_videos.first[mine][first]}, "
                f"the one before ends at frame {due[first]}: images and rows do not match",
                RECOLLECT if dataset.manifest else REWRITE,
            )


def picture_faults(
    dataset: EpisodeDataset, progress: ProgressIterator = no_progress
) -> Iterator[DamagedError]:
    """Yield cameras that show a constant image during an episode in which the arm moves.

    A few frames of up to MAX_CHECKED_EPISODES episodes are decoded, evenly spaced over the dataset.
    """
    span = np.ptp(dataset.states, axis=0)
    count = min(dataset.num_episodes, MAX_CHECKED_EPISODES)
    chosen = np.unique(np.linspace(0, dataset.num_episodes - 1, count).round().astype(int))
    frozen: dict[str, list[int]] = {camera: [] for camera in dataset.cameras}
    for episode in progress(chosen.tolist(), "pictures"):
        first, stop = dataset.starts[episode : episode + 2]
        moved = np.ptp(dataset.states[first:stop], axis=0)
        if stop - first < 2 or not (moved > MOVED_SHARE * np.maximum(span, 1e-9)).any():
            continue
        rows = np.unique(np.linspace(first, stop - 1, 6).round().astype(np.int64))
        for camera in dataset.cameras:
            try:
                pictures = dataset.frames(rows, camera).astype(np.int16)
            except BlmError:
                continue  # unreadable videos are reported by another check
            if np.abs(pictures - pictures[0]).max() <= CODEC_NOISE:
                frozen[camera].append(episode)
    for camera, episodes in frozen.items():
        if episodes:
            yield DamagedError(
                f"dataset '{dataset.folder}': camera '{camera}' shows the same image throughout episodes in "
                f"which the arm moves, {_list_episodes(np.array(episodes))} (of {len(chosen)} checked)",
                "view them with `blm view`, and record them again or leave them out",
            )


def shape_faults(dataset: EpisodeDataset) -> Iterator[DamagedError]:
    """Yield features whose declared shape differs from that of their columns or videos."""
    where, info = f"'{dataset.folder / 'meta/info.json'}'", dataset.info
    fix = RECOLLECT if dataset.manifest else REWRITE
    cameras = {key: camera for camera, key in (dataset.mapping.cameras if dataset.mapping else {}).items()}
    files = sorted((dataset.folder / "data").rglob("[!.]*.parquet"))
    row = pq.ParquetFile(files[0]).read_row_group(0).slice(0, 1).to_pydict() if files else {}
    for name, feature in features_of(dataset.folder, info).items():
        if not feature.get("shape") or feature["dtype"] == "image":
            continue
        declared = tuple(feature["shape"])
        if feature["dtype"] == "video":
            camera = cameras.get(name, name.removeprefix("observation.images."))
            found = dataset.stored_shapes.get(camera)
            videos = dataset.camera_videos.get(camera)
            with suppress(DamagedError):  # unreadable videos are reported by another check
                found = probe(videos.files[0]).shape if videos else found
            if found and found not in (declared[:2], declared[1:]):
                yield DamagedError(f"{where} declares {name} as {declared}, its video is {found}", fix)
        elif name not in row:
            yield DamagedError(f"{where} declares {name}, which the data files lack", fix)
        elif np.shape(row[name][0]) != declared and not (
            declared in ((1,), ()) and np.ndim(row[name][0]) == 0
        ):
            yield DamagedError(
                f"{where} declares {name} as {declared}, its column is {np.shape(row[name][0])}", fix
            )


def lfs_pointer_faults(folder: Path) -> Iterator[DamagedError]:
    """Yield the files that are Git LFS pointers."""
    for path in sorted(folder.rglob("*")):
        try:
            require_no_pointer(path)
        except DamagedError as error:
            yield error


def unreadable_files(folder: Path, progress: ProgressIterator = no_progress) -> Iterator[DamagedError]:
    """Yield files that cannot be parsed or fully decoded, for a dataset without a manifest.

    Reads all files.
    """
    for path in progress(sorted(path for part in PARTS for path in (folder / part).rglob("[!.]*")), "files"):
        try:
            require_no_pointer(path)
            if path.suffix == ".mp4" and (good := decodable_frames(path)) < (listed := probe(path).frames):
                yield DamagedError(f"video '{path}': only {good} of {listed} frames can be decoded")
            elif path.suffix == ".parquet":
                with reading(path):
                    for _ in pq.ParquetFile(
                        path
                    ).iter_batches():  # batches, because a file may not fit in memory
                        pass
            elif path.suffix in (".json", ".jsonl"):
                with reading(path), path.open(encoding="utf-8") as file:
                    for part in file if path.suffix == ".jsonl" else [file.read()]:
                        json.loads(part)
        except DamagedError as error:
            yield error


def _probe_faults(
    dataset: EpisodeDataset, path: Path, need: int, shape: tuple[int, int], every: bool
) -> Iterator[DamagedError]:
    have, rate = probe(path), dataset.space.rate_hz
    if have.frames < need or ((dataset.manifest or every) and have.frames != need):
        extra = (
            f": {have.frames - need} too many, so images and rows may not match" if have.frames > need else ""
        )
        yield DamagedError(f"video '{path}' has {have.frames} frames, its episodes need {need}{extra}")
    if dataset.camera_videos and all(one.by_order for one in dataset.camera_videos.values()):
        pass  # the clock of the mapping is the number of the frame
    elif abs(have.rate * need / rate - need) > 0.5:
        yield DamagedError(f"video '{path}' has {have.rate:g} frames per second, its dataset has {rate:g}")
    elif every and have.frames:
        times = frame_times(path) * rate
        off = np.abs(times - np.arange(len(times))) > TIMESTAMP_TOLERANCE
        if off.any():
            yield DamagedError(
                f"video '{path}' shows {off.sum()} frames at other times than {rate:g} Hz from 0 s on, "
                f"first frame {int(np.argmax(off))}"
            )
    if have.shape != shape:
        yield DamagedError(f"video '{path}' has images of {have.shape}, its dataset has {shape}")


def _list_episodes(episodes: NDArray[np.int64]) -> str:
    """Return e.g. 'in episodes 1, 2, 7', with at most eight numbers."""
    numbers = np.unique(episodes).tolist()
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"in episodes {', '.join(map(str, numbers[:8]))}{more}"
