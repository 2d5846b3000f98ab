"""Writing LeRobotDataset v3.0 folders in two steps that survive a kill at any moment.

`stage_episode` stores one episode, from any worker process. `finalize_dataset` joins staged
episodes in the order of (task, seed), so the same episodes give the same bytes. Import both from
`blm.datasets.lerobot`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blm.datasets.files import write_manifest, written_here
from blm.datasets.statistics import Stats, compute_stats, histogram_stats, image_histogram
from blm.datasets.video import concatenate, encode
from blm.io import new_folder, reading, write_json, writing
from blm.seeds import count_reserved_seeds
from blm.types import ActionSpace, BlmError, ContractError, Episode

FORMAT = 2
"""Version of the "blm" key of info.json. Version 2 added executed actions and the manifest."""
CODEBASE_VERSION = "v3.0"
"""LeRobot's format version."""
CHUNK = "chunk-000/file-000"
"""All episodes are in one data file, and in one video file per camera."""
SUBTASK = "subtask_index"
"""Column with the index of the current primitive, whose names are in meta/subtasks.parquet."""
DATA_FILE = f"data/{CHUNK}.parquet"
EPISODES_FILE = f"meta/episodes/{CHUNK}.parquet"

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class BlmInfo:
    """The key "blm" of meta/info.json, for information that LeRobot has no key for."""

    action_space: ActionSpace
    cameras: tuple[str, ...]
    image_size: int
    """Side of the pictures [px]."""
    primitives: tuple[str, ...]
    """Names of the primitives, which `primitive_column` is an index into."""
    primitive_column: str = SUBTASK
    reserved_seeds: Mapping[str, int] = field(default_factory=dict)
    """Purpose -> episodes on scenes that are not for training."""

    def to_json(self) -> dict[str, Any]:
        values = {"format": FORMAT, **asdict(self), "action_space": self.action_space.to_json()}
        if not self.reserved_seeds:
            del values["reserved_seeds"]
        return values

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(
            action_space=ActionSpace.from_json(value["action_space"]),
            cameras=tuple(value["cameras"]),
            image_size=value["image_size"],
            primitives=tuple(value["primitives"]),
            primitive_column=value["primitive_column"],
            reserved_seeds=value.get("reserved_seeds", {}),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class StagedEpisode:
    """An episode that `stage_episode` wrote: episode.json, vectors.npz and a video per camera."""

    folder: Path
    key: str
    robot: str
    task: str
    seed: int
    instruction: str
    success: bool
    length: int
    primitives: Sequence[str]
    metrics: Mapping[str, float]
    image_shapes: Mapping[str, Sequence[int]]
    """Camera -> height, width, channels."""
    vectors: Columns
    """"states", "actions", "executed" -> [T, D]."""
    histograms: Columns
    """Camera -> histogram of its pixels."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        with reading(folder):
            description = json.loads((folder / "episode.json").read_text())
            arrays = dict(np.load(folder / "vectors.npz"))
            histograms = {camera: arrays.pop(f"histogram.{camera}") for camera in description["image_shapes"]}
            return cls(folder=folder, vectors=arrays, histograms=histograms, **description)


def video_key(camera: str) -> str:
    """Return LeRobot's feature name of a camera."""
    return f"observation.images.{camera}"


def video_file(camera: str) -> str:
    """Return the video file of a camera, relative to the dataset."""
    return f"videos/{video_key(camera)}/{CHUNK}.mp4"


def stage_episode(folder: Path, key: str, episode: Episode, fps: int = 20) -> Path:
    """Write one episode to `folder/key` atomically and return that folder.

    The same episode is replaced.

    Raises ContractError for arrays that differ in length or are not finite, and BlmError on disk
    errors; then nothing of the episode is left.
    """
    _check_episode(key, episode)

    def written(target: Path) -> set[str]:
        staged = StagedEpisode.read(target)
        if staged.key != key:
            raise BlmError(f"'{target}' is not a staged episode '{key}'; move it away")
        return {"episode.json", "vectors.npz", *(f"{name}.mp4" for name in staged.image_shapes)}

    target = folder / key
    with writing(folder), new_folder(target, written=written) as work:
        _stage(work, key, episode, fps)
    return target


def _stage(work: Path, key: str, episode: Episode, fps: int) -> None:
    arrays: Columns = {name: np.asarray(array, np.float32) for name, array in _vectors(episode).items()}
    for camera, frames in episode.images.items():
        arrays[f"histogram.{camera}"] = image_histogram(frames)
        encode(work / f"{camera}.mp4", frames, fps)
    np.savez(work / "vectors.npz", allow_pickle=False, **arrays)
    description = {
        name: getattr(episode, name) for name in ("robot", "task", "seed", "instruction", "success")
    }
    description |= {
        "key": key,
        "length": len(episode),
        "primitives": episode.primitives or ["unknown"] * len(episode),
        "metrics": dict(episode.metrics),
        "image_shapes": {camera: frames.shape[1:] for camera, frames in episode.images.items()},
    }
    (work / "episode.json").write_text(json.dumps(description))


def _vectors(episode: Episode) -> Columns:
    """Return states, actions and executed actions, [T, D] each.

    Without noise the last two are equal.
    """
    executed = episode.actions if episode.executed is None else episode.executed
    return {"states": episode.states, "actions": episode.actions, "executed": executed}


def _check_episode(key: str, episode: Episode) -> None:
    vectors = _vectors(episode)
    columns = [*vectors.values(), *episode.images.values(), episode.primitives or episode.states]
    lengths = {len(column) for column in columns}
    if len(lengths) != 1 or not len(episode):
        raise ContractError(
            f"episode '{key}': states, actions, executed, images, primitives differ in length: {lengths}"
        )
    if len({array.shape for array in vectors.values()}) != 1:
        shapes = {name: array.shape for name, array in vectors.items()}
        raise ContractError(f"episode '{key}': vectors differ in shape: {shapes}")
    for name, array in vectors.items():
        if not np.isfinite(array).all():
            raise ContractError(f"episode '{key}': {name} hold a value that is not finite; drop this episode")


def finalize_dataset(
    staged: Sequence[Path],
    out: Path,
    *,
    space: ActionSpace,
    cameras: Sequence[str],
    image_size: int,
    provenance: Mapping[str, Any],
) -> Path:
    """Assemble staged episodes into the dataset folder `out` atomically. Idempotent.

    `provenance` (versions, seeds, configuration) is stored in the manifest. An existing dataset is
    replaced only if it is of the same collection (equal `provenance["collect"]`) and unaltered;
    files of others in it are kept. Raises BlmError without episodes, for any other folder at `out`,
    and on disk errors (then `out` and the staged episodes are unchanged); ContractError for an
    episode of another robot, camera or image size.
    """
    if not staged:
        raise BlmError(
            f"no episode to write to '{out}': every attempt was rejected, see the rejection counts"
        )
    rows = [StagedEpisode.read(folder) for folder in staged]
    rows.sort(key=lambda row: (row.task, row.seed, row.key))
    for row in rows:
        shapes = {camera: row.image_shapes.get(camera) for camera in cameras}
        if row.robot != space.robot or any(s != [image_size, image_size, 3] for s in shapes.values()):
            raise ContractError(
                f"episode '{row.key}' of robot '{row.robot}' has images {shapes}; "
                f"this dataset is for '{space.robot}' with cameras {tuple(cameras)} of {image_size} px"
            )
    own = BlmInfo(
        action_space=space,
        cameras=tuple(cameras),
        image_size=image_size,
        primitives=tuple(sorted({name for row in rows for name in row.primitives})),
        reserved_seeds=count_reserved_seeds(row.seed for row in rows),
    )
    with writing(out), new_folder(out, written=partial(written_here, provenance=provenance)) as work:
        _write(work, rows, round(space.rate_hz), own)
        write_manifest(work, FORMAT, provenance)
    return out


def _write(folder: Path, rows: list[StagedEpisode], fps: int, own: BlmInfo) -> None:
    """Write all files of a dataset from the staged episodes in their final order."""
    for name in (DATA_FILE, EPISODES_FILE, *map(video_file, own.cameras)):
        (folder / name).parent.mkdir(parents=True)
    tasks = list(dict.fromkeys(row.instruction for row in rows))
    columns = _columns(rows, fps, tasks, own.primitives)
    stats = {name: compute_stats(values) for name, values in columns.items()}
    for camera in own.cameras:
        stats[video_key(camera)] = histogram_stats(np.sum([row.histograms[camera] for row in rows], axis=0))
        concatenate([row.folder / f"{camera}.mp4" for row in rows], folder / video_file(camera))
    pq.write_table(pa.table({k: _to_arrow(v) for k, v in columns.items()}), folder / DATA_FILE)
    entries = [_entry(row, i, columns, fps, own.cameras) for i, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(entries), folder / EPISODES_FILE)
    pq.write_table(text_index("task_index", tasks), folder / "meta/tasks.parquet")
    pq.write_table(text_index(SUBTASK, own.primitives), folder / "meta/subtasks.parquet")
    write_json(folder / "meta/stats.json", {name: _stats_json(value) for name, value in stats.items()})
    write_json(folder / "meta/modality.json", _modality(own))
    write_json(folder / "meta/info.json", _info(rows, columns, fps, own))


def _columns(rows: list[StagedEpisode], fps: int, tasks: list[str], primitives: Sequence[str]) -> Columns:
    """Return the per-frame columns of the data file, with LeRobot's names and types."""
    lengths = [row.length for row in rows]
    frame = np.concatenate([np.arange(n) for n in lengths])
    success_from = [
        row.metrics.get("success_step", n - 1) if row.success else n
        for row, n in zip(rows, lengths, strict=True)
    ]
    return {
        "observation.state": np.concatenate([row.vectors["states"] for row in rows]),
        "action": np.concatenate([row.vectors["actions"] for row in rows]),
        "executed_action": np.concatenate([row.vectors["executed"] for row in rows]),
        "timestamp": (frame / fps).astype(np.float32),
        "frame_index": frame,
        "episode_index": np.repeat(np.arange(len(rows)), lengths),
        "index": np.arange(len(frame)),
        "task_index": np.repeat([tasks.index(row.instruction) for row in rows], lengths),
        "next.success": frame >= np.repeat(success_from, lengths),
        SUBTASK: np.array([primitives.index(name) for row in rows for name in row.primitives]),
    }


def _entry(row: StagedEpisode, i: int, columns: Columns, fps: int, cameras: Sequence[str]) -> dict[str, Any]:
    """Return row `i` of the episodes table: text, place in the files, statistics."""
    start, stop = (int(x) for x in np.searchsorted(columns["episode_index"], [i, i + 1]))
    entry: dict[str, Any] = {
        "episode_index": i,
        "tasks": [row.instruction],
        "length": row.length,
        "dataset_from_index": start,
        "dataset_to_index": stop,
        "blm/task": row.task,
        "blm/seed": row.seed,
        "blm/metrics": json.dumps(row.metrics),
    }
    stats = {name: compute_stats(values[start:stop]) for name, values in columns.items()}
    for camera in cameras:
        video = f"videos/{video_key(camera)}"
        entry |= {f"{video}/from_timestamp": start / fps, f"{video}/to_timestamp": stop / fps}
        stats[video_key(camera)] = histogram_stats(row.histograms[camera])
    for place in ("data", "meta/episodes", *(f"videos/{video_key(camera)}" for camera in cameras)):
        entry |= {f"{place}/chunk_index": 0, f"{place}/file_index": 0}
    for name, value in stats.items():
        entry |= {f"stats/{name}/{key}": item for key, item in _stats_json(value).items()}
    return entry


def _info(rows: list[StagedEpisode], columns: Columns, fps: int, own: BlmInfo) -> dict[str, Any]:
    space = own.action_space
    cameras = own.cameras
    side = own.image_size
    features: dict[str, Any] = {}
    for name, values in columns.items():
        names = list(space.names) if values.ndim == 2 else None
        features[name] = {"dtype": str(values.dtype), "shape": list(values.shape[1:]) or [1], "names": names}
    video = {"video.height": side, "video.width": side, "video.codec": "h264", "video.pix_fmt": "yuv420p"}
    video |= {"video.fps": fps, "video.channels": 3, "video.is_depth_map": False, "has_audio": False}
    shape = {"shape": [side, side, 3], "names": ["height", "width", "channels"]}
    features |= {video_key(camera): {"dtype": "video", **shape, "info": video} for camera in cameras}
    template = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    return {
        "codebase_version": CODEBASE_VERSION,
        "robot_type": space.robot,
        "total_episodes": len(rows),
        "total_frames": len(columns["index"]),
        "total_tasks": len({row.instruction for row in rows}),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": fps,
        "splits": {"train": f"0:{len(rows)}"},
        "data_path": f"data/{template}.parquet",
        "video_path": f"videos/{{video_key}}/{template}.mp4" if cameras else None,
        "features": features,
        "blm": own.to_json(),
    }


def _modality(own: BlmInfo) -> dict[str, Any]:
    """Return GR00T's description of the columns: arm and gripper as slices."""
    dim = own.action_space.dim
    parts = {"arm": {"start": 0, "end": dim - 1}, "gripper": {"start": dim - 1, "end": dim}}
    return {
        "state": parts,
        "action": parts,
        "video": {camera: {"original_key": video_key(camera)} for camera in own.cameras},
        "annotation": {
            "human.task_description": {"original_key": "task_index"},
            "human.subtask_description": {"original_key": SUBTASK},
        },
    }


def text_index(column: str, texts: Sequence[str]) -> pa.Table:
    """Return a table that pandas reads with text as the index, which LeRobot expects."""
    index = "__index_level_0__"
    table = pa.table({column: pa.array(range(len(texts)), pa.int64()), index: pa.array(texts, pa.string())})
    keys = ("name", "field_name", "pandas_type", "numpy_type", "metadata")
    kinds = [(column, column, "int64", "int64", None), (None, index, "unicode", "object", None)]
    columns = [dict(zip(keys, kind, strict=True)) for kind in kinds]
    pandas = {"index_columns": [index], "column_indexes": [], "columns": columns}
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _to_arrow(values: NDArray[Any]) -> pa.Array:
    flat = pa.array(values.ravel())
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _stats_json(stats: Stats) -> dict[str, Any]:
    return stats.to_json() | {"count": [stats.count]}
