"""Writing LeRobotDataset v3.0 folders, in two steps that survive a kill at any moment.

`stage_episode` stores one episode by itself, from any worker process. `finalize_dataset` joins staged
episodes, ordered by (task, seed), into the final folder: the same episodes give the same bytes, whichever
worker finished first. Everybody else imports both from `blm.data.episodes`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blm.data.stats import compute_stats, histogram_stats, image_histogram
from blm.data.video import concatenate, encode
from blm.types import ActionSpace, BlmError, ContractError, Episode, Stats

FORMAT = 1
"""Version of the "blm" key of info.json. LeRobot's own version is `codebase_version`."""
CODEBASE_VERSION = "v3.0"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_FILE = "meta/episodes/chunk-000/file-000.parquet"


def video_key(camera: str) -> str:
    return f"observation.images.{camera}"


def stage_episode(folder: Path, key: str, episode: Episode, fps: int = 20) -> dict[str, Any]:
    """Write one episode to `folder/key` atomically and return its description (the staged `episode.json`).

    Staging the same key again replaces it. Raises ContractError for arrays that disagree in length or are
    not finite.
    """
    _check_episode(key, episode)
    target = folder / key
    work = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    arrays = {
        "states": np.asarray(episode.states, np.float32),
        "actions": np.asarray(episode.actions, np.float32),
    }
    histograms = {f"histogram.{name}": image_histogram(frames) for name, frames in episode.images.items()}
    np.savez(work / "vectors.npz", allow_pickle=False, **arrays, **histograms)
    for camera, frames in episode.images.items():
        encode(work / f"{camera}.mp4", frames, fps)
    description = {
        "key": key,
        "robot": episode.robot,
        "task": episode.task,
        "seed": episode.seed,
        "instruction": episode.instruction,
        "length": len(episode),
        "success": episode.success,
        "primitives": list(episode.primitives or ["unknown"] * len(episode)),
        "metrics": dict(episode.metrics),
        "image_shapes": {camera: list(frames.shape[1:]) for camera, frames in episode.images.items()},
    }
    (work / "episode.json").write_text(json.dumps(description))
    shutil.rmtree(target, ignore_errors=True)
    work.rename(target)
    return description


def _check_episode(key: str, episode: Episode) -> None:
    lengths = {len(episode.states), len(episode.actions), *(len(x) for x in episode.images.values())}
    lengths |= {len(episode.primitives)} if episode.primitives else set()
    if len(lengths) != 1 or not len(episode):
        raise ContractError(
            f"episode '{key}': states, actions, images, primitives differ in length: {lengths}"
        )
    for name, array in (("states", episode.states), ("actions", episode.actions)):
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
    """Assemble staged episodes into the dataset folder `out`, replacing it in one rename. Idempotent.

    Raises BlmError without episodes, ContractError for an episode of another robot, camera or image size.
    """
    if not staged:
        raise BlmError(
            f"no episode to write to '{out}': every attempt was rejected, see the rejection counts"
        )
    rows = [(json.loads((folder / "episode.json").read_text()), folder) for folder in staged]
    rows.sort(key=lambda row: (row[0]["task"], row[0]["seed"], row[0]["key"]))
    for row, _ in rows:
        shapes = {camera: row["image_shapes"].get(camera) for camera in cameras}
        if row["robot"] != space.robot or any(s != [image_size, image_size, 3] for s in shapes.values()):
            raise ContractError(
                f"episode '{row['key']}' of robot '{row['robot']}' has images {shapes}; "
                f"this dataset is for '{space.robot}' with cameras {tuple(cameras)} of {image_size} px"
            )
    work, old = out.with_name(f".{out.name}.writing"), out.with_name(f".{out.name}.old")
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    _Writer(work, rows, space, tuple(cameras), image_size).write(provenance)
    if out.exists():
        out.rename(old)
    work.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    return out


class _Writer:
    """Builds one dataset folder from (description, staged folder) rows in their final order.

    One data file, and one video file for each camera, hold all episodes.
    """

    def __init__(
        self,
        folder: Path,
        rows: list[tuple[dict[str, Any], Path]],
        space: ActionSpace,
        cameras: tuple[str, ...],
        image_size: int,
    ) -> None:
        self.folder, self.space, self.cameras, self.image_size = folder, space, cameras, image_size
        self.rows = [row for row, _ in rows]
        self.sources = [source for _, source in rows]
        self.arrays = [dict(np.load(source / "vectors.npz")) for source in self.sources]
        self.fps = round(space.rate_hz)
        self.tasks = list(dict.fromkeys(row["instruction"] for row in self.rows))
        self.primitives = sorted({name for row in self.rows for name in row["primitives"]})
        self.lengths = np.array([row["length"] for row in self.rows])
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])

    def write(self, provenance: Mapping[str, Any]) -> None:
        columns = self._columns()
        stats = {name: compute_stats(_as_rows(values)) for name, values in columns.items()}
        for camera in self.cameras:
            stats[video_key(camera)] = histogram_stats(sum(a[f"histogram.{camera}"] for a in self.arrays))
            video = self._path(VIDEO_PATH.format(video_key=video_key(camera), chunk_index=0, file_index=0))
            concatenate([source / f"{camera}.mp4" for source in self.sources], video)
        data = pa.table({name: _to_arrow(values) for name, values in columns.items()})
        pq.write_table(data, self._path(DATA_PATH.format(chunk_index=0, file_index=0)))
        episodes = [self._episode(i, columns) for i in range(len(self.rows))]
        pq.write_table(pa.Table.from_pylist(episodes), self._path(EPISODES_FILE))
        pq.write_table(_text_index("task_index", self.tasks), self._path("meta/tasks.parquet"))
        pq.write_table(_text_index("subtask_index", self.primitives), self._path("meta/subtasks.parquet"))
        self._json("stats", {name: _stats_json(value) for name, value in stats.items()})
        self._json("modality", self._modality())
        self._json("info", self._info(columns, provenance))

    def _columns(self) -> dict[str, NDArray[Any]]:
        """Per-frame columns of the data file, in LeRobot's names and types."""
        frame = np.concatenate([np.arange(n) for n in self.lengths])
        episode = np.repeat(np.arange(len(self.rows)), self.lengths)
        first_success = [
            row["metrics"].get("success_step", n - 1) if row["success"] else n
            for row, n in zip(self.rows, self.lengths, strict=True)
        ]
        task = np.array([self.tasks.index(row["instruction"]) for row in self.rows])
        names = {name: i for i, name in enumerate(self.primitives)}
        return {
            "observation.state": np.concatenate([a["states"] for a in self.arrays]),
            "action": np.concatenate([a["actions"] for a in self.arrays]),
            "timestamp": (frame / self.fps).astype(np.float32),
            "frame_index": frame,
            "episode_index": episode,
            "index": np.arange(len(frame)),
            "task_index": task[episode],
            "next.success": frame >= np.array(first_success)[episode],
            "subtask_index": np.array([names[name] for row in self.rows for name in row["primitives"]]),
        }

    def _episode(self, i: int, columns: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """One row of the episodes table."""
        row, start, stop = self.rows[i], int(self.starts[i]), int(self.starts[i + 1])
        entry: dict[str, Any] = {
            "episode_index": i,
            "tasks": [row["instruction"]],
            "length": row["length"],
            "dataset_from_index": start,
            "dataset_to_index": stop,
            "blm/task": row["task"],
            "blm/seed": row["seed"],
            "blm/metrics": json.dumps(row["metrics"]),
        }
        stats = {name: compute_stats(_as_rows(values[start:stop])) for name, values in columns.items()}
        for camera in self.cameras:
            entry[f"videos/{video_key(camera)}/from_timestamp"] = start / self.fps
            entry[f"videos/{video_key(camera)}/to_timestamp"] = stop / self.fps
            stats[video_key(camera)] = histogram_stats(self.arrays[i][f"histogram.{camera}"])
        for place in ("data", "meta/episodes", *(f"videos/{video_key(camera)}" for camera in self.cameras)):
            entry |= {f"{place}/chunk_index": 0, f"{place}/file_index": 0}
        for name, value in stats.items():
            entry |= {f"stats/{name}/{key}": item for key, item in _stats_json(value).items()}
        return entry

    def _features(self, columns: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        names = {"observation.state": list(self.space.names), "action": list(self.space.names)}
        features: dict[str, Any] = {
            name: {
                "dtype": str(values.dtype),
                "shape": list(values.shape[1:]) or [1],
                "names": names.get(name),
            }
            for name, values in columns.items()
        }
        side = self.image_size
        video = {"video.height": side, "video.width": side, "video.codec": "h264", "video.pix_fmt": "yuv420p"}
        video |= {"video.fps": self.fps, "video.channels": 3, "video.is_depth_map": False, "has_audio": False}
        shape = {"shape": [side, side, 3], "names": ["height", "width", "channels"]}
        for camera in self.cameras:
            features[video_key(camera)] = {"dtype": "video", **shape, "info": video}
        return features

    def _info(self, columns: Mapping[str, NDArray[Any]], provenance: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "codebase_version": CODEBASE_VERSION,
            "robot_type": self.space.robot,
            "total_episodes": len(self.rows),
            "total_frames": int(self.starts[-1]),
            "total_tasks": len(self.tasks),
            "chunks_size": 1000,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self.rows)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self.cameras else None,
            "features": self._features(columns),
            "blm": {
                "format": FORMAT,
                "action_space": self.space.to_json(),
                "cameras": list(self.cameras),
                "image_size": self.image_size,
                "primitives": self.primitives,
                "provenance": dict(provenance),
            },
        }

    def _modality(self) -> dict[str, Any]:
        """GR00T's description of the columns: joints and gripper as slices of state and action."""
        arm = self.space.dim - 1
        parts = {"arm": {"start": 0, "end": arm}, "gripper": {"start": arm, "end": arm + 1}}
        return {
            "state": parts,
            "action": parts,
            "video": {camera: {"original_key": video_key(camera)} for camera in self.cameras},
            "annotation": {"human.task_description": {"original_key": "task_index"}},
        }

    def _json(self, name: str, value: Any) -> None:
        self._path(f"meta/{name}.json").write_text(json.dumps(value, indent=2) + "\n")

    def _path(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _text_index(column: str, texts: Sequence[str]) -> pa.Table:
    """Return a pandas frame whose index is text. LeRobot reads it with pandas, which needs this metadata."""
    index = {
        "name": None,
        "field_name": "__index_level_0__",
        "pandas_type": "unicode",
        "numpy_type": "object",
    }
    value = {"name": column, "field_name": column, "pandas_type": "int64", "numpy_type": "int64"}
    columns = [{**entry, "metadata": None} for entry in (value, index)]
    pandas = {"index_columns": ["__index_level_0__"], "column_indexes": [], "columns": columns}
    table = {
        column: pa.array(range(len(texts)), pa.int64()),
        "__index_level_0__": pa.array(texts, pa.string()),
    }
    return pa.table(table).replace_schema_metadata({"pandas": json.dumps(pandas)})


def _as_rows(values: NDArray[Any]) -> NDArray[Any]:
    return values.reshape(len(values), -1)


def _to_arrow(values: NDArray[Any]) -> pa.Array:
    flat = pa.array(values.ravel())
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _stats_json(stats: Stats) -> dict[str, Any]:
    return stats.to_json() | {"count": [stats.count]}
