"""One opened dataset: vectors in memory, video frames on demand. `blm.datasets.lerobot` opens it.

Shape legend: N frames, E episodes, D dimensions.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from blm.datasets.files import content_hash, describe_files
from blm.datasets.video import VideoFile
from blm.seeds import reserved
from blm.types import ActionSpace, ContractError, Episode, FloatArray, ImageArray, Stats

VECTORS: Final = ("observation.state", "action", "executed_action")
OPEN_FILES = 16
"""Videos held open at a time for each camera."""
IndexArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Footage:
    """Where the frames of one camera are."""

    files: tuple[Path, ...]
    file: IndexArray
    """[E] number of the file that holds an episode."""
    first: IndexArray
    """[E] frame in that file at which the episode starts."""
    shape: tuple[int, int]
    """Height and width [px]."""
    _open: dict[int, VideoFile] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def read(self, number: int, frame: int) -> ImageArray:
        """Return a frame of file `number`; files not used for longest are closed. Safe between threads.

        An open file has one place: two threads that seek in it would get each other's frames.
        """
        with self._lock:
            video = self._open.pop(number, None) or VideoFile(self.files[number])
            self._open[number] = video
            if len(self._open) > OPEN_FILES:
                del self._open[next(iter(self._open))]
            return video.read(frame)


@dataclass(frozen=True, kw_only=True, eq=False)
class EpisodeDataset:
    """A dataset of one robot. What a foreign dataset does not say is marked as unknown, never guessed."""

    folder: Path
    info: Mapping[str, Any]
    """meta/info.json."""
    manifest: Mapping[str, Any]
    """meta/manifest.json; empty for a dataset that another program wrote."""
    space: ActionSpace
    footage: Mapping[str, Footage]
    """Camera -> place of its frames."""
    stats: Mapping[str, Stats]
    """Of `VECTORS`, over all N frames."""
    states: FloatArray
    actions: FloatArray
    executed: FloatArray
    """All [N, D] float32. `actions` are the labels to learn, `executed` what was done (noise included)."""
    timestamps: FloatArray
    """[N] seconds since the start of the episode."""
    episode_index: IndexArray
    instructions: tuple[str, ...]
    """All instructions; frame i has `instructions[task_index[i]]`."""
    task_index: IndexArray
    primitives: NDArray[np.str_]
    """[N] name of the primitive in progress; "unknown" in a foreign dataset."""
    success: NDArray[np.bool_]
    """[N] whether the success rule holds from this frame on; False where a foreign dataset does not say."""
    starts: IndexArray
    """[E + 1] first frame of each episode."""
    tasks: tuple[str, ...]
    """[E] name of the task; "unknown" in a foreign dataset."""
    seeds: tuple[int, ...]
    """[E] seed of the scene; -1 in a foreign dataset."""
    metrics: tuple[Mapping[str, float], ...]
    """[E]."""

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(self.footage)

    @property
    def image_shapes(self) -> dict[str, tuple[int, int]]:
        """Camera -> height and width [px] of its frames."""
        return {camera: footage.shape for camera, footage in self.footage.items()}

    @property
    def image_size(self) -> int:
        """Side [px] of the pictures. Raises ContractError unless those of all cameras are equal squares."""
        if len(sides := {side for shape in self.image_shapes.values() for side in shape}) != 1:
            raise ContractError(
                f"dataset '{self.folder}' has pictures of height and width {self.image_shapes}; squares of "
                "one size are needed: rewrite its videos, or read them with frames() and resize"
            )
        return sides.pop()

    @property
    def num_episodes(self) -> int:
        return len(self.tasks)

    @property
    def num_frames(self) -> int:
        return len(self.states)

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the writer of the dataset stored about its origin: versions, configuration, seeds."""
        return dict(self.manifest.get("provenance", {}))

    @property
    def reserved_seeds(self) -> dict[str, int]:
        """Purpose -> number of episodes whose scene is reserved for it, and not for training; often empty."""
        return reserved(self.seeds)

    @cached_property
    def content_hash(self) -> str:
        """Hash of the content of all files, videos included; from the manifest, or computed if foreign."""
        return content_hash(self.manifest or {"files": describe_files(self.folder)})

    def frames(self, indices: Sequence[int] | IndexArray, camera: str) -> ImageArray:
        """Return frames [n, H, W, 3] of one camera for dataset frame numbers, in the order asked for.

        Increasing numbers are fastest. Raises ContractError for a camera that the dataset lacks.
        """
        self._require_cameras([camera])
        footage, rows = self.footage[camera], np.asarray(indices, np.int64)
        episodes = self.episode_index[rows]
        files = footage.file[episodes]
        numbers = footage.first[episodes] + rows - self.starts[episodes]
        images = np.empty((len(rows), *footage.shape, 3), np.uint8)
        for place in np.lexsort((numbers, files)):
            images[place] = footage.read(int(files[place]), int(numbers[place]))
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
            executed=self.executed[rows],
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
