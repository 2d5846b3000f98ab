"""Reading LeRobotDatasets v3.0, v2.1 and v2.0 of other programs.

Missing information is marked as unknown, and ambiguous data are refused with a BlmError. Images
must be stored as videos. Shape legend: N frames, E episodes, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blm.datasets.dataset import VECTORS, CameraVideos, EpisodeDataset, IndexArray
from blm.datasets.statistics import compute_stats
from blm.datasets.video import probe
from blm.io import DamagedError, read_json_lines, reading
from blm.types import ActionSpace, BlmError

REWRITE = "fix it with the program that wrote it"
STATE, ACTION = VECTORS[:2]
Videos = tuple[tuple[Path, ...], IndexArray, IndexArray]
"""Video files, index of the file of each episode [E], and its first frame there [E]."""


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The parts of a dataset that differ between the format versions."""

    starts: IndexArray
    """[E + 1] first frame of each episode, and the number of frames."""
    data: tuple[Path, ...]
    """Parquet files, in the order of their frames."""
    videos: Mapping[str, Videos]
    """Feature -> its videos."""
    instructions: tuple[str, ...]


def load_foreign(folder: Path, info: Mapping[str, Any]) -> EpisodeDataset:
    """Read a dataset without our "blm" key.

    Raises BlmError for missing, damaged or ambiguous data.
    """
    version = info["codebase_version"]
    if version not in _LAYOUTS:
        raise BlmError(f"'{folder}' is a LeRobotDataset {version}; this program reads {', '.join(_LAYOUTS)}")
    features = info["features"]
    _require_features(folder, features)
    videos = {k: v for k, v in features.items() if v["dtype"] == "video" and not _is_depth(v)}
    layout = _LAYOUTS[version](folder, info, tuple(videos))
    optional = [name for name in ("next.success",) if name in features]
    columns = _read_columns(
        layout, [STATE, ACTION, "timestamp", "episode_index", "index", "task_index", *optional]
    )
    count, episodes = int(layout.starts[-1]), len(layout.starts) - 1
    if not np.array_equal(columns["index"], np.arange(count)):
        raise DamagedError(f"'{folder}': the column 'index' of its data files is not 0..{count - 1}", REWRITE)
    if not np.isin(columns["task_index"], np.arange(len(layout.instructions))).all():
        raise DamagedError(f"'{folder}': data files name a task_index that meta/tasks lacks", REWRITE)
    states, actions = (columns[name].astype(np.float32).reshape(count, -1) for name in (STATE, ACTION))
    statistics = compute_stats(actions)
    return EpisodeDataset(
        folder=folder,
        info=info,
        manifest=None,
        space=_space(folder, info, actions),
        camera_videos={
            key.removeprefix("observation.images."): CameraVideos(
                files=files, file=file, first=first, shape=probe(files[0]).shape
            )
            for key, (files, file, first) in layout.videos.items()
        },
        stats=dict(zip(VECTORS, (compute_stats(states), statistics, statistics), strict=True)),
        states=states,
        actions=actions,
        executed=actions,
        timestamps=columns["timestamp"],
        episode_index=columns["episode_index"],
        instructions=layout.instructions,
        task_index=columns["task_index"],
        primitives=np.full(count, "unknown"),
        success=columns.get("next.success", np.zeros(count)).astype(bool),
        starts=layout.starts,
        tasks=("unknown",) * episodes,
        seeds=(-1,) * episodes,
        metrics=({},) * episodes,
    )


def _require_features(folder: Path, features: Mapping[str, Any]) -> None:
    missing = [name for name in (STATE, ACTION) if name not in features]
    if missing:
        raise BlmError(f"'{folder}' lacks {', '.join(missing)}; its features are {', '.join(features)}")
    if pictures := [name for name, feature in features.items() if feature["dtype"] == "image"]:
        raise BlmError(
            f"'{folder}' keeps images in data files ({', '.join(pictures)}), this program reads videos: "
            "convert it with LeRobot's 'lerobot-edit-dataset --operation.type convert_image_to_video'"
        )
    shapes = {name: tuple(features[name]["shape"]) for name in (STATE, ACTION)}
    if shapes[STATE] != shapes[ACTION] or len(shapes[ACTION]) != 1:
        raise BlmError(
            f"'{folder}' has shapes {shapes}; this program needs states and actions of the same joints"
        )


def _is_depth(feature: Mapping[str, Any]) -> bool:
    return bool(feature.get("info", feature.get("video_info", {})).get("video.is_depth_map"))


def _space(folder: Path, info: Mapping[str, Any], actions: NDArray[np.float32]) -> ActionSpace:
    """Return the action space as far as it is known: names, extremes of the data, rate."""
    names, dim = info["features"][ACTION].get("names"), actions.shape[1]
    if isinstance(names, dict) and sorted(map(str, names.values())) == sorted(map(str, range(dim))):
        names = sorted(names, key=names.__getitem__)
    elif isinstance(names, dict) and len(names) == 1:  # {"motors": [..]}
        names = next(iter(names.values()))
    if names is None:
        names = [str(i) for i in range(dim)]
    if not isinstance(names, list) or len(names) != dim:
        raise BlmError(f"'{folder}': action has {dim} dimensions but the names {names}; fix meta/info.json")
    fields = {"robot": info.get("robot_type") or "unknown", "rate_hz": float(info["fps"]), "kind": "unknown"}
    low, high = actions.min(axis=0).tolist(), actions.max(axis=0).tolist()
    return ActionSpace.from_json(
        fields | {"names": list(map(str, names)), "units": ["unknown"] * dim, "low": low, "high": high}
    )


def _layout_v3(folder: Path, info: Mapping[str, Any], videos: Sequence[str]) -> _Layout:
    places = [
        f"videos/{key}/{part}" for key in videos for part in ("chunk_index", "file_index", "from_timestamp")
    ]
    wanted = ["length", "dataset_from_index", "data/chunk_index", "data/file_index", *places]
    tables = []
    for path in sorted((folder / "meta/episodes").rglob("*.parquet")):
        with reading(path):
            tables.append(pq.read_table(path, columns=wanted))
    with reading(folder / "meta/episodes"):
        table = pa.concat_tables(tables)
        rows = {name: table[name].to_numpy() for name in wanted}
    starts = _starts(folder, rows["length"])
    if not np.array_equal(rows["dataset_from_index"], starts[:-1]):
        raise DamagedError(f"'{folder}/meta/episodes': episodes do not follow one another", REWRITE)

    def files(place: str, template: str, **key: str) -> tuple[tuple[Path, ...], IndexArray]:
        pairs = np.stack([rows[f"{place}/chunk_index"], rows[f"{place}/file_index"]], axis=1)
        unique, number = np.unique(pairs, axis=0, return_inverse=True)
        paths = [_path(folder, template, chunk_index=int(c), file_index=int(f), **key) for c, f in unique]
        return tuple(paths), number.ravel()

    camera_videos: dict[str, Videos] = {}
    for key in videos:
        first = rows[f"videos/{key}/from_timestamp"] * info["fps"]
        if np.abs(first - np.round(first)).max() > 0.1:
            raise DamagedError(f"'{folder}': episodes start between two frames of {key}", REWRITE)
        camera_videos[key] = (
            *files(f"videos/{key}", info["video_path"], video_key=key),
            np.round(first).astype(np.int64),
        )
    with reading(folder / "meta/tasks.parquet"):
        tasks = pq.read_table(folder / "meta/tasks.parquet")
        (text,) = [name for name in tasks.column_names if name != "task_index"]
        named = dict(zip(tasks["task_index"].to_pylist(), tasks[text].to_pylist(), strict=True))
    data = files("data", info["data_path"])[0]
    return _Layout(starts=starts, data=data, videos=camera_videos, instructions=_texts(folder, named))


def _layout_v2(folder: Path, info: Mapping[str, Any], videos: Sequence[str]) -> _Layout:
    with reading(folder / "meta/episodes.jsonl") as path:
        lengths = {row["episode_index"]: row["length"] for row in read_json_lines(path)}
    if sorted(lengths) != list(range(len(lengths))):
        raise DamagedError(f"'{path}' does not name episodes 0..{len(lengths) - 1}", REWRITE)
    with reading(folder / "meta/tasks.jsonl") as path:
        named = {row["task_index"]: row["task"] for row in read_json_lines(path)}
    numbers = np.arange(len(lengths))

    def files(template: str, **key: str) -> tuple[Path, ...]:
        return tuple(
            _path(folder, template, episode_chunk=i // info["chunks_size"], episode_index=i, **key)
            for i in range(len(lengths))
        )

    return _Layout(
        starts=_starts(folder, np.array([lengths[i] for i in numbers.tolist()], np.int64)),
        data=files(info["data_path"]),
        videos={
            key: (files(info["video_path"], video_key=key), numbers, np.zeros_like(numbers)) for key in videos
        },
        instructions=_texts(folder, named),
    )


_LAYOUTS: Mapping[str, Callable[[Path, Mapping[str, Any], Sequence[str]], _Layout]] = {
    "v3.0": _layout_v3,
    "v2.1": _layout_v2,
    "v2.0": _layout_v2,
}


def _starts(folder: Path, lengths: IndexArray) -> IndexArray:
    if not len(lengths) or lengths.min() < 1:
        raise DamagedError(f"'{folder}' has no episode, or an empty one", REWRITE)
    return np.concatenate([[0], np.cumsum(lengths)])


def _texts(folder: Path, named: Mapping[int, str]) -> tuple[str, ...]:
    if sorted(named) != list(range(len(named))):
        raise DamagedError(f"'{folder}/meta/tasks': task_index is not 0..{len(named) - 1}", REWRITE)
    return tuple(named[i] for i in range(len(named)))


def _path(folder: Path, template: str, **fields: Any) -> Path:
    if not isinstance(template, str):
        raise TypeError(f"a path of its files is {template!r}")
    name = PurePosixPath(template.format(**fields))
    if name.is_absolute() or ".." in name.parts:
        raise BlmError(f"'{folder}/meta/info.json' names the file '{name}', outside of the dataset")
    return folder / name


def _read_columns(layout: _Layout, names: list[str]) -> dict[str, NDArray[Any]]:
    """Return columns [N] or [N, D] of all data files. Raises BlmError that names a damaged file."""
    parts: list[dict[str, NDArray[Any]]] = []
    for path in layout.data:
        with reading(path):
            table = pq.read_table(path, columns=names)
            parts.append({name: matrix(table[name]) for name in names})
            for name, values in parts[-1].items():
                if values.shape[1:] != (first := parts[0][name].shape[1:]):
                    raise ValueError(f"{name} has rows of {values.shape[1:]}, the first file of {first}")
    have = sum(len(part["index"]) for part in parts)
    need = int(layout.starts[-1])
    if have != need:
        raise DamagedError(f"'{layout.data[0].parent.parent}' holds {have} frames, its episodes need {need}")
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return a column of numbers as [N], or of equally long lists as [N, D].

    Raises ValueError if ragged.
    """
    if not pa.types.is_nested(column.type):
        return column.to_numpy()
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) != 1 or lengths[0] is None:
        raise ValueError(f"lists of different lengths: {lengths}")
    return pc.list_flatten(column).to_numpy().reshape(len(column), lengths[0])
