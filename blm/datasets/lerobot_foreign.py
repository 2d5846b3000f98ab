"""Reading LeRobotDatasets v3.0, v2.1 and v2.0 of other programs.

They are read through a mapping. Without one, information that they do not state is marked as
unknown. Shape legend: N frames, E episodes, S and D dimensions of state and action.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blm.datasets.dataset import VECTORS, CameraVideos, EpisodeDataset, IndexArray
from blm.datasets.lerobot_columns import bare_mapping, features_of, matrix
from blm.datasets.lerobot_layouts import REWRITE, Layout, read_layout
from blm.datasets.mapping import DataMapping
from blm.datasets.statistics import compute_stats
from blm.datasets.stored_pictures import StoredPictures
from blm.datasets.video import probe
from blm.io import DamagedError, reading
from blm.types import BlmError

Columns = dict[str, NDArray[Any]]


def load_foreign(folder: Path, info: Mapping[str, Any], mapping: DataMapping | None = None) -> EpisodeDataset:
    """Read a dataset without our "blm" key.

    Raises BlmError for missing, damaged or ambiguous data.
    """
    known = mapping or bare_mapping(folder, info)
    features = features_of(folder, info)
    missing = [name for name in (*known.features, *known.cameras.values()) if name not in features]
    if missing:
        raise BlmError(f"'{folder}' lacks {', '.join(missing)}; its features are {', '.join(features)}")
    videos = tuple(key for key in known.cameras.values() if features[key]["dtype"] == "video")
    in_order = known.clock == "frame_index"
    layout = read_layout(folder, info, videos, known.rate_hz, in_order)
    columns = _read_columns(folder, layout, known)
    episode_index, frame_index = _order(folder, layout, columns)
    instructions, task_index = _instructions(folder, known, layout, columns)
    with reading(folder / "data"):
        states, actions = known.read({name: columns[name] for name in known.features})
    statistics = compute_stats(actions)
    count, episodes = int(layout.starts[-1]), len(layout.lengths)
    stamps = None if in_order else columns.get("timestamp")
    return EpisodeDataset(
        folder=folder,
        info=info,
        manifest=None,
        space=known.action_space(),
        camera_videos={
            camera: CameraVideos(
                files=files, file=file, first=first, shape=probe(files[0]).shape, by_order=in_order
            )
            for camera, key in known.cameras.items()
            if key in layout.videos
            for files, file, first in [layout.videos[key]]
        },
        camera_pictures={
            camera: StoredPictures.open(folder, layout.data, key)
            for camera, key in known.cameras.items()
            if key not in layout.videos
        },
        stats=dict(zip(VECTORS, (compute_stats(states), statistics, statistics), strict=True)),
        states=states,
        actions=actions,
        executed=actions,
        timestamps=frame_index / known.rate_hz if stamps is None else stamps.reshape(count),
        episode_index=episode_index,
        instructions=instructions,
        task_index=task_index,
        primitives=np.full(count, "unknown"),
        success=columns.get("next.success", np.zeros(count)).reshape(count).astype(bool),
        starts=layout.starts,
        tasks=("unknown",) * episodes,
        seeds=(-1,) * episodes,
        metrics=({},) * episodes,
        mapping=mapping,
    )


def _read_columns(folder: Path, layout: Layout, mapping: DataMapping) -> Columns:
    """Return the columns [N] or [N, k] of all data files that are needed or help.

    Raises BlmError that names a damaged file.
    """
    helpful = {"timestamp", "frame_index", "episode_index", "next.success", mapping.instruction_column}
    needed, parts = {*mapping.features}, list[Columns]()
    for path in layout.data:
        with reading(path):
            present = {*pq.read_schema(path).names}
            names = sorted(needed | (helpful & present))
            table = pq.read_table(path, columns=names)
            parts.append({name: matrix(table[name]) for name in names})
            for name, values in parts[-1].items():
                if name in parts[0] and values.shape[1:] != (first := parts[0][name].shape[1:]):
                    raise ValueError(f"{name} has rows of {values.shape[1:]}, the first file of {first}")
    have = sum(len(next(iter(part.values()))) for part in parts)
    need = int(layout.starts[-1])
    if have != need:
        raise DamagedError(f"'{folder / 'data'}' holds {have} frames, its episodes need {need}", REWRITE)
    everywhere = set.intersection(*({*part} for part in parts))
    return {name: np.concatenate([part[name] for part in parts]) for name in sorted(everywhere)}


def _order(folder: Path, layout: Layout, columns: Columns) -> tuple[IndexArray, IndexArray]:
    """Return the episode [N] and the place in it [N] of each frame; missing columns are computed.

    Raises DamagedError for frames that are not in the order of their episodes.
    """
    episode = np.repeat(np.arange(len(layout.lengths)), layout.lengths)
    place = np.arange(len(episode)) - layout.starts[episode]
    numbers = np.array(layout.episodes)[episode]
    for name, due in (("episode_index", numbers), ("frame_index", place)):
        found = columns.get(name, due).reshape(-1)
        if len(wrong := np.flatnonzero(found != due)):
            first = int(wrong[0])
            raise DamagedError(
                f"'{folder}': frames are not in the order of their episodes: {name} of row {first} is "
                f"{found[first]}, due is {due[first]}",
                REWRITE,
            )
    return episode, place


def _instructions(
    folder: Path, mapping: DataMapping, layout: Layout, columns: Columns
) -> tuple[tuple[str, ...], IndexArray]:
    """Return all instructions, and the number of that of each frame [N].

    Raises BlmError if the dataset states none.
    """
    count = int(layout.starts[-1])
    if mapping.instruction is not None:
        return (mapping.instruction,), np.zeros(count, np.int64)
    column = columns.get(mapping.instruction_column)
    if column is not None and column.dtype.kind in "OUS":
        texts, number = np.unique(column.astype(str), return_inverse=True)
        return tuple(texts.tolist()), number.ravel().astype(np.int64)
    if layout.tasks and column is not None:
        number = column.reshape(count).astype(np.int64)
        used, place = np.unique(number, return_inverse=True)
        if absent := [one for one in used.tolist() if one not in layout.tasks]:
            raise DamagedError(
                f"'{folder}': data files name a task_index that meta/tasks lacks: {absent[:8]}", REWRITE
            )
        if sorted(layout.tasks) == list(range(len(layout.tasks))):
            return tuple(layout.tasks[i] for i in range(len(layout.tasks))), number
        return tuple(layout.tasks[i] for i in used.tolist()), place.ravel().astype(np.int64)
    if layout.episode_tasks or len(layout.tasks) == 1:
        given = layout.episode_tasks or (*layout.tasks.values(),) * len(layout.lengths)
        texts, number = np.unique(given, return_inverse=True)
        return tuple(texts.tolist()), np.repeat(number.ravel(), layout.lengths)
    raise BlmError(
        f"'{folder}' states no instruction (meta/tasks, '{mapping.instruction_column}'); state it as "
        f'"instruction" in a mapping: blm doctor {folder} --suggest writes one'
    )
