"""The dataset format: LeRobotDataset v3.0, one dataset per robot.

All access goes through this module.

Information without a place in LeRobot's format (action space, primitives, format version) is stored
in `meta/info.json` under the key "blm", in episode columns "blm/..." and in `meta/manifest.json`.
LeRobot ignores these. See docs/datasets.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blm.datasets.checks import opening_faults
from blm.datasets.dataset import VECTORS, CameraVideos, EpisodeDataset
from blm.datasets.files import MANIFEST, Manifest, verify_files
from blm.datasets.lerobot_columns import matrix
from blm.datasets.lerobot_foreign import load_foreign
from blm.datasets.lerobot_writer import (
    CODEBASE_VERSION,
    DATA_FILE,
    EPISODES_FILE,
    FORMAT,
    BlmInfo,
    finalize_dataset,
    stage_episode,
    video_file,
)
from blm.datasets.mapping import DataMapping, mappings_for
from blm.datasets.statistics import Stats
from blm.io import read_json, reading, recover_folder
from blm.types import BlmError

__all__ = [
    "EpisodeDataset",
    "finalize_dataset",
    "load_dataset",
    "open_dataset",
    "open_mapped",
    "stage_episode",
    "stated_mappings",
    "verify_files",
]


def open_dataset(folder: Path | str, mapping: DataMapping | None = None) -> EpisodeDataset:
    """Open and check a dataset: one of this program, or any LeRobotDataset v2.0, v2.1 or v3.0.

    Videos are not decoded or hashed; `verify_files` does that. A foreign dataset is read through
    `mapping`; without one, its action space has the names of its features, no limits, and unknown
    kinds and units. Raises BlmError that names file and fix for a missing, damaged or ambiguous dataset.
    """
    dataset = load_dataset(folder, mapping)
    for fault in opening_faults(dataset):
        raise fault
    return dataset


def open_mapped(folders: Sequence[Path], mappings: Sequence[Path]) -> list[EpisodeDataset]:
    """Open and check datasets, each through its mapping (see `mappings_for`). Raises BlmError."""
    found = mappings_for(folders, mappings)
    return [open_dataset(folder, mapping) for folder, mapping in zip(folders, found, strict=True)]


def stated_mappings(datasets: Sequence[EpisodeDataset]) -> dict[str, dict[str, Any]]:
    """Return the mappings of the datasets, as a part of the provenance; {} if there are none."""
    found = {str(data.folder): data.mapping.to_json() for data in datasets if data.mapping is not None}
    return {"mappings": found} if found else {}


def load_dataset(folder: Path | str, mapping: DataMapping | None = None) -> EpisodeDataset:
    """Read a dataset without checking its content.

    Raises BlmError for a file that cannot be read.
    """
    folder = recover_folder(Path(folder))
    info_path = folder / "meta/info.json"
    if not info_path.is_file():
        raise BlmError(
            f"no dataset at '{folder}' (no meta/info.json); give the folder of one robot, or collect it"
        )
    info = read_json(info_path)
    with reading(info_path):
        if "blm" not in info:
            return load_foreign(folder, info, mapping)
        if mapping is not None:
            raise BlmError(
                f"'{folder}' is a dataset of this program, which states everything; give no mapping"
            )
        versions = (info["codebase_version"], info["blm"].get("format"))
    if versions != (CODEBASE_VERSION, FORMAT):
        raise BlmError(
            f"dataset '{folder}' has LeRobot version and blm format {versions}, this program reads "
            f"{(CODEBASE_VERSION, FORMAT)}; collect it again or use the matching program version"
        )
    return _load_own(folder, info)


def _read_frames(folder: Path, own: BlmInfo) -> dict[str, NDArray[Any]]:
    """Return the columns of the data file, one row per frame."""
    with reading(folder / DATA_FILE):
        table = pq.read_table(folder / DATA_FILE)
        columns = {name: matrix(table[name]) for name in table.column_names}
        missing = {*VECTORS, own.primitive_column} - set(columns)
        if missing:
            raise KeyError(", ".join(sorted(missing)))
    return columns


def _load_own(folder: Path, info: Mapping[str, Any]) -> EpisodeDataset:
    with reading(folder / "meta/info.json"):
        own = BlmInfo.from_json(info["blm"])
    columns = _read_frames(folder, own)
    with reading(folder / EPISODES_FILE):
        episodes = pq.read_table(folder / EPISODES_FILE).to_pydict()
        starts = np.array([*episodes["dataset_from_index"], episodes["dataset_to_index"][-1]])
        metrics = tuple(json.loads(text) for text in episodes["blm/metrics"])
    with reading(folder / "meta/tasks.parquet"):
        texts = pq.read_table(folder / "meta/tasks.parquet")["__index_level_0__"].to_pylist()
    manifest = Manifest.read(folder) if (folder / MANIFEST).exists() else None
    with reading(folder / "meta/stats.json") as path:
        stats = read_json(path)
        vectors = {k: Stats.from_json({**stats[k], "count": stats[k]["count"][0]}) for k in VECTORS}
    with reading(folder / "meta/info.json"):
        file = np.zeros(len(starts) - 1, np.int64)
        shape = (own.image_size, own.image_size)
        return EpisodeDataset(
            folder=folder,
            info=info,
            manifest=manifest,
            space=own.action_space,
            camera_videos={
                name: CameraVideos(
                    files=(folder / video_file(name),), file=file, first=starts[:-1], shape=shape
                )
                for name in own.cameras
            },
            stats=vectors,
            states=columns["observation.state"],
            actions=columns["action"],
            executed=columns["executed_action"],
            timestamps=columns["timestamp"],
            episode_index=columns["episode_index"],
            instructions=tuple(texts),
            task_index=columns["task_index"],
            primitives=np.array(own.primitives)[columns[own.primitive_column]],
            success=columns["next.success"],
            starts=starts,
            tasks=tuple(episodes["blm/task"]),
            seeds=tuple(episodes["blm/seed"]),
            metrics=metrics,
        )
