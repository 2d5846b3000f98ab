"""An opened dataset: vectors in memory, video frames on demand.

Shape legend: N frames, E episodes, S dimensions of the state, D of the action.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from blm.action_space import ACTION_KINDS
from blm.datasets.files import Manifest, content_hash, describe_files
from blm.datasets.mapping import DataMapping
from blm.datasets.statistics import Stats
from blm.datasets.stored_pictures import StoredPictures
from blm.datasets.video import VideoFile
from blm.pictures import fit_picture
from blm.seeds import count_reserved_seeds
from blm.types import (
    ActionSpace,
    BlmError,
    ContractError,
    Episode,
    FloatArray,
    ImageArray,
    PictureFit,
    Training,
)

VECTORS: Final = ("observation.state", "action", "executed_action")
"""Names of the vector features: [N, S], [N, D] and [N, D]."""
OPEN_FILES = 16
"""Maximum number of open video files per camera."""
IndexArray = NDArray[np.int64]
"""Array of frame, episode or file numbers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CameraVideos:
    """The video files of one camera, and the place of each episode in them."""

    files: tuple[Path, ...]
    file: IndexArray
    """[E] index into `files` of each episode."""
    first: IndexArray
    """[E] frame in the file at which each episode starts."""
    shape: tuple[int, int]
    """Height and width [px]."""
    by_order: bool = False
    """Frames are numbered in their order, whatever their times are."""
    _open: dict[int, VideoFile] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process opens the files again."""
        names = ("files", "file", "first", "shape", "by_order")
        return partial(CameraVideos, **{name: getattr(self, name) for name in names}), ()

    def read(self, number: int, frame: int) -> ImageArray:
        """Return one frame [H, W, 3] of file `number`.

        Thread-safe; least recently used files are closed.

        The lock is held for the whole read, because an open file has one decoder position: two
        threads that seek in it would get each other's frames.
        """
        with self._lock:
            video = self._open.pop(number, None) or VideoFile(self.files[number], self.by_order)
            self._open[number] = video
            if len(self._open) > OPEN_FILES:
                del self._open[next(iter(self._open))]
            return video.read(frame)


@dataclass(frozen=True, kw_only=True, eq=False)
class EpisodeDataset:
    """A dataset of one robot.

    Information that a foreign dataset lacks is marked as unknown, never guessed.
    """

    folder: Path
    info: Mapping[str, Any]
    """meta/info.json."""
    manifest: Manifest | None
    """meta/manifest.json; None for a dataset of another program."""
    space: ActionSpace
    camera_videos: Mapping[str, CameraVideos]
    """Camera -> its video files."""
    stats: Mapping[str, Stats]
    """Statistics of `VECTORS` over all N frames."""
    states: FloatArray
    actions: FloatArray
    executed: FloatArray
    """[N, S] states; [N, D] actions, the labels without noise; [N, D] executed actions, with noise:
    all float32."""
    timestamps: FloatArray
    """[N] time since the start of the episode [s]."""
    episode_index: IndexArray
    instructions: tuple[str, ...]
    """All instructions; frame i has `instructions[task_index[i]]`."""
    task_index: IndexArray
    primitives: NDArray[np.str_]
    """[N] name of the primitive in progress; "unknown" in a foreign dataset."""
    success: NDArray[np.bool_]
    """[N] whether the success rule holds from this frame on; False where it is unknown."""
    starts: IndexArray
    """[E + 1] first frame of each episode."""
    tasks: tuple[str, ...]
    """[E] name of the task; "unknown" in a foreign dataset."""
    seeds: tuple[int, ...]
    """[E] seed of the scene; -1 in a foreign dataset."""
    metrics: tuple[Mapping[str, float], ...]
    """[E] metrics of each episode."""
    camera_pictures: Mapping[str, StoredPictures] = field(default_factory=dict)
    """Camera -> its pictures, if the dataset keeps them in its data files."""
    mapping: DataMapping | None = None
    """What a dataset of another program was read through; None: what it states itself."""

    @property
    def cameras(self) -> tuple[str, ...]:
        return (*self.camera_videos, *self.camera_pictures)

    @property
    def picture_fit(self) -> PictureFit:
        """How pictures become squares."""
        return "exact" if self.mapping is None else self.mapping.picture_fit

    @property
    def stored_shapes(self) -> dict[str, tuple[int, int]]:
        """Camera -> height and width [px] of its pictures in the dataset."""
        videos = {camera: one.shape for camera, one in self.camera_videos.items()}
        return videos | {camera: one.shape for camera, one in self.camera_pictures.items()}

    @property
    def image_shapes(self) -> dict[str, tuple[int, int]]:
        """Camera -> height and width [px] of its frames as they are read."""
        side = None if self.mapping is None else self.mapping.image_size
        return self.stored_shapes if side is None else dict.fromkeys(self.cameras, (side, side))

    @property
    def image_size(self) -> int:
        """Side of the images [px].

        Raises ContractError unless all cameras have equal square images.
        """
        if len(sides := {side for shape in self.image_shapes.values() for side in shape}) != 1:
            raise ContractError(
                f"dataset '{self.folder}' has images of height and width {self.image_shapes}; squares of "
                "one size are needed: read it through a mapping with the picture_fit letterbox or crop "
                f"(blm doctor {self.folder} --suggest)"
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
        """Provenance that the writer of the dataset stored: versions, configuration, seeds."""
        return {} if self.manifest is None else self.manifest.provenance

    @property
    def training(self) -> Training:
        """Whether the recorded scenes were randomized; unknown for a dataset of another program.

        Datasets that were collected before this was recorded state their configuration.
        """
        collect = self.provenance.get("collect")
        if "training" in self.provenance or collect is None:
            stated: Training = self.provenance.get("training", "unknown")
            return stated
        looks = collect.get("appearance") or {}  # an earlier name of the randomization
        return "randomized" if collect.get("distractors") or any(looks.values()) else "plain"

    @property
    def reserved_seeds(self) -> dict[str, int]:
        """Purpose -> number of episodes whose scene is reserved for it, and not for training."""
        return count_reserved_seeds(self.seeds)

    @cached_property
    def content_hash(self) -> str:
        """Hash of all files, from the manifest or computed for a foreign dataset, and of the mapping."""
        files = content_hash(self.manifest.files if self.manifest else describe_files(self.folder))
        if self.mapping is None:
            return files
        return hashlib.sha256((files + self.mapping.sha256).encode()).hexdigest()

    def frames(self, indices: Sequence[int] | IndexArray, camera: str) -> ImageArray:
        """Return frames [n, H, W, 3] of one camera for dataset frame numbers `indices` [n].

        Increasing numbers are fastest. Raises ContractError for a camera that the dataset lacks.
        """
        self._require_cameras([camera])
        rows = np.asarray(indices, np.int64)
        side = None if self.mapping is None else self.mapping.image_size
        images = np.empty((len(rows), *self.image_shapes[camera], 3), np.uint8)
        for place, picture in self._stored(rows, camera):
            images[place] = picture if side is None else self._fitted(picture, side, int(rows[place]), camera)
        return images

    def _fitted(self, picture: ImageArray, side: int, frame: int, camera: str) -> ImageArray:
        return fit_picture(picture, self.picture_fit, side, f"frame {frame} of camera '{camera}'")

    def _stored(self, rows: IndexArray, camera: str) -> Iterator[tuple[int, ImageArray]]:
        """Yield place in `rows` and picture as it is stored, in the fastest order."""
        if camera in self.camera_pictures:
            for place in np.argsort(rows, kind="stable").tolist():
                yield place, self.camera_pictures[camera].read(int(rows[place]))
            return
        camera_videos, episodes = self.camera_videos[camera], self.episode_index[rows]
        files = camera_videos.file[episodes]
        numbers = camera_videos.first[episodes] + rows - self.starts[episodes]
        for place in np.lexsort((numbers, files)).tolist():
            yield place, camera_videos.read(int(files[place]), int(numbers[place]))

    def episode(self, i: int, cameras: Sequence[str] | None = None) -> Episode:
        """Return episode `i` with the images of `cameras` (None: all cameras)."""
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
        """Raise ContractError unless space, cameras, image size and rate match."""
        space.require_same(self.space, f"dataset '{self.folder}'")
        self._require_cameras(cameras)
        needs = {"image size": (image_size, self.image_size), "rate [Hz]": (rate_hz, self.space.rate_hz)}
        for name, (need, have) in needs.items():
            if need != have:
                raise ContractError(f"dataset '{self.folder}': {name} is {have}, {need} is needed")

    def require_known_kinds(self) -> None:
        """Raise BlmError unless it is known which actions are targets and which are deltas."""
        if self.mapping is None and self.space.kind == "unknown":
            raise BlmError(
                f"dataset '{self.folder}' is of another program, and states neither kinds nor units: run "
                f"`blm doctor {self.folder} --suggest`, check the mapping that it writes, and give it with "
                "--mappings"
            )
        if self.mapping is not None and self.mapping.undecided:
            valid = ", ".join(kind for kind in ACTION_KINDS if kind != "unknown")
            raise BlmError(
                f"the mapping of '{self.folder}' leaves the kind of {', '.join(self.mapping.undecided)} "
                f"unknown; write one of {valid}"
            )

    def _require_cameras(self, cameras: Sequence[str]) -> None:
        missing = [camera for camera in cameras if camera not in self.cameras]
        if missing:
            raise ContractError(
                f"dataset '{self.folder}' has cameras {self.cameras}, lacks {', '.join(missing)}"
            )
