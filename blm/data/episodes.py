"""The dataset format: LeRobotDataset v3.0, one dataset per robot. The only door to that folder.

What LeRobot has no place for (action space, seeds, versions, image size) is in `meta/info.json` under the
key "blm" and in episode columns "blm/...", which LeRobot ignores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blm.data.video import VideoFile, count_frames
from blm.data.writing import (
    CODEBASE_VERSION,
    DATA_FILE,
    EPISODES_FILE,
    FORMAT,
    finalize_dataset,
    stage_episode,
    video_file,
)
from blm.types import ActionSpace, BlmError, ContractError, Episode, FloatArray, ImageArray, Stats

__all__ = ["EpisodeDataset", "finalize_dataset", "open_dataset", "stage_episode"]

IndexArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class EpisodeDataset:
    """One opened dataset: vectors in memory, video frames on demand. N frames, E episodes, D dimensions."""

    folder: Path
    info: Mapping[str, Any]
    space: ActionSpace
    cameras: tuple[str, ...]
    image_size: int
    stats: Mapping[str, Stats]
    """Of "observation.state" and "action", over all N frames."""
    states: FloatArray
    actions: FloatArray
    """Both [N, D] float32."""
    episode_index: IndexArray
    instructions: tuple[str, ...]
    """All instructions; frame i has `instructions[task_index[i]]`."""
    task_index: IndexArray
    primitives: NDArray[np.str_]
    """[N] name of the primitive in progress."""
    success: NDArray[np.bool_]
    """[N] whether the success rule holds from this frame to the end of its episode."""
    starts: IndexArray
    """[E + 1] first frame of each episode."""
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    metrics: tuple[Mapping[str, float], ...]
    """[E], like tasks and seeds."""
    _videos: dict[str, VideoFile] = field(default_factory=dict, repr=False)

    @property
    def num_episodes(self) -> int:
        return len(self.tasks)

    @property
    def num_frames(self) -> int:
        return len(self.states)

    def frames(self, indices: Sequence[int] | IndexArray, camera: str) -> ImageArray:
        """Return frames [n, H, W, 3] of one camera for dataset frame numbers, in the order asked for.

        Increasing numbers are fastest. Raises ContractError for a camera that the dataset lacks.
        """
        self._require_cameras([camera])
        if camera not in self._videos:
            self._videos[camera] = VideoFile(self.folder / video_file(camera))
        images = np.empty((len(indices), self.image_size, self.image_size, 3), np.uint8)
        for place in np.argsort(indices, kind="stable"):
            images[place] = self._videos[camera].read(int(indices[place]))
        return images

    def episode(self, i: int, cameras: Sequence[str] | None = None) -> Episode:
        """Return episode `i` with the pictures of `cameras` (default: all; an empty list loads none)."""
        rows = np.arange(self.starts[i], self.starts[i + 1])
        return Episode(
            robot=self.space.robot,
            task=self.tasks[i],
            seed=self.seeds[i],
            instruction=self.instructions[self.task_index[rows[0]]],
            states=self.states[rows],
            actions=self.actions[rows],
            images={name: self.frames(rows, name) for name in (self.cameras if cameras is None else cameras)},
            primitives=tuple(self.primitives[rows].tolist()),
            success=bool(self.success[rows[-1]]),
            metrics=self.metrics[i],
        )

    def require(self, space: ActionSpace, cameras: Sequence[str], image_size: int, rate_hz: float) -> None:
        """Raise ContractError, printing both sides, unless the dataset offers exactly what is needed."""
        space.require_same(self.space, f"dataset '{self.folder}'")
        self._require_cameras(cameras)
        needs = {"image size": (image_size, self.image_size), "rate [Hz]": (rate_hz, self.info["fps"])}
        for name, (need, have) in needs.items():
            if need != have:
                raise ContractError(f"dataset '{self.folder}': {name} is {have}, {need} is needed")

    def _require_cameras(self, cameras: Sequence[str]) -> None:
        missing = [camera for camera in cameras if camera not in self.cameras]
        if missing:
            raise ContractError(
                f"dataset '{self.folder}' has cameras {self.cameras}, lacks {', '.join(missing)}"
            )

    @cached_property
    def content_hash(self) -> str:
        """Hash of the description, the vectors, and the names and sizes of the videos."""
        digest = hashlib.sha256((self.folder / "meta/info.json").read_bytes())
        digest.update((self.folder / DATA_FILE).read_bytes())
        for name in sorted(video_file(camera) for camera in self.cameras):
            digest.update(f"{name} {(self.folder / name).stat().st_size}".encode())
        return digest.hexdigest()


def open_dataset(folder: Path | str) -> EpisodeDataset:
    """Open and check a dataset. Raises BlmError naming file and fix for a missing, foreign or damaged one."""
    folder = Path(folder)
    info_path = folder / "meta/info.json"
    if not info_path.is_file():
        raise BlmError(
            f"no dataset at '{folder}' (no meta/info.json); give the folder of one robot, or collect it"
        )
    info = json.loads(info_path.read_text())
    own = info.get("blm", {})
    versions = (info.get("codebase_version"), own.get("format"))
    if versions != (CODEBASE_VERSION, FORMAT):
        raise BlmError(
            f"dataset '{folder}' has LeRobot version and blm format {versions}, this program reads "
            f"{(CODEBASE_VERSION, FORMAT)}; collect it again or use the matching program version"
        )
    table = pq.read_table(folder / DATA_FILE)
    columns = {name: _from_arrow(table[name]) for name in table.column_names}
    episodes = pq.read_table(folder / EPISODES_FILE).to_pydict()
    stats = json.loads((folder / "meta/stats.json").read_text())
    vectors = {name: stats[name] for name in ("observation.state", "action")}
    dataset = EpisodeDataset(
        folder=folder,
        info=info,
        space=ActionSpace.from_json(own["action_space"]),
        cameras=tuple(own["cameras"]),
        image_size=own["image_size"],
        stats={k: Stats.from_json({**v, "count": v["count"][0]}) for k, v in vectors.items()},
        states=columns["observation.state"],
        actions=columns["action"],
        episode_index=columns["episode_index"],
        instructions=tuple(pq.read_table(folder / "meta/tasks.parquet")["__index_level_0__"].to_pylist()),
        task_index=columns["task_index"],
        primitives=np.array(own["primitives"])[columns["subtask_index"]],
        success=columns["next.success"],
        starts=np.array([*episodes["dataset_from_index"], len(table)]),
        tasks=tuple(episodes["blm/task"]),
        seeds=tuple(episodes["blm/seed"]),
        metrics=tuple(json.loads(text) for text in episodes["blm/metrics"]),
    )
    _check(dataset)
    return dataset


def _check(dataset: EpisodeDataset) -> None:
    """Raise BlmError for values that are not finite, foreign statistics, or videos of another length."""
    for name, array in (("observation.state", dataset.states), ("action", dataset.actions)):
        if array.shape[1] != dataset.space.dim:
            raise ContractError(
                f"dataset '{dataset.folder}': {name} is {array.shape}, needs D={dataset.space.dim}"
            )
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        if len(bad):
            raise BlmError(
                f"dataset '{dataset.folder}': {name} is not finite in {len(bad)} frames, first in episode "
                f"{dataset.episode_index[bad[0]]}; delete the dataset folder and collect again"
            )
        stats = dataset.stats[name]
        if stats.count != len(array) or not np.allclose([stats.min, stats.max], [array.min(0), array.max(0)]):
            raise BlmError(f"dataset '{dataset.folder}': stats.json is not of these frames; collect it again")
    for path in (dataset.folder / video_file(camera) for camera in dataset.cameras):
        if (have := count_frames(path)) != (need := dataset.num_frames):
            raise BlmError(
                f"video '{path}' has {have} frames, its episodes need {need}; restore the file, or delete "
                "the dataset folder and collect again"
            )


def _from_arrow(column: pa.ChunkedArray) -> NDArray[Any]:
    if pa.types.is_fixed_size_list(column.type):
        return column.combine_chunks().flatten().to_numpy().reshape(len(column), -1)
    return column.to_numpy()
