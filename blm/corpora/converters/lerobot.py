"""Converter of LeRobotDatasets: questions about an episode's instruction, progress and primitive.

It reads our datasets and foreign ones (v2.0, v2.1, v3.0), which only have an instruction. A video
that holds one episode is referenced. From a video with many episodes, frames are stored as
images, because reading a late frame would decode all frames before it. Richer questions about
episodes are in `blm.corpora.scenes.episodes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from blm.corpora.converters.report import Tally
from blm.corpora.converters.rows import ConverterConfig, Rows, evenly_spaced
from blm.corpora.format.faults import RowError
from blm.corpora.format.messages import Conversation
from blm.datasets.dataset import EpisodeDataset
from blm.datasets.lerobot import open_dataset
from blm.types import BlmError, ContractError, Image, Message

PROGRESS = (0.25, 0.5, 0.75, 1.0)
"""Shares of an episode at which its progress is asked."""


def lerobot(source: Path, settings: ConverterConfig, tally: Tally) -> Rows:
    """Convert all episodes of one dataset. Raises ContractError for a camera that it lacks."""
    dataset = open_dataset(source)
    cameras = settings.cameras or dataset.cameras[:1]
    if missing := set(cameras) - set(dataset.cameras):
        raise ContractError(f"'{source}' has cameras {dataset.cameras}, lacks {', '.join(sorted(missing))}")
    for episode in range(dataset.num_episodes):
        for camera in cameras:
            where = f"{source}: episode {episode}, camera {camera}"
            try:
                for row in _episode(dataset, episode, camera, settings):
                    yield where, row
            except BlmError as error:
                yield where, RowError("media unreadable", str(error))


def _episode(
    dataset: EpisodeDataset, episode: int, camera: str, settings: ConverterConfig
) -> Iterator[Conversation]:
    first, end = int(dataset.starts[episode]), int(dataset.starts[episode + 1])
    instruction = dataset.instructions[int(dataset.task_index[first])].strip()
    name = f"lerobot/{dataset.folder.resolve().name}/{episode}"
    if dataset.seeds[episode] >= 0:  # our own scene: the group of all questions about it
        group = f"episode/{dataset.space.robot}/{dataset.tasks[episode]}/{dataset.seeds[episode]}"
    else:
        group = name
    for part in PROGRESS:
        last = first + max(round(part * (end - first)), 1) - 1
        rows = evenly_spaced(range(first, last + 1), settings.frames or 8)
        asked = [("progress", f"The task: {instruction} How much of it is done, in percent?", f"{part:.0%}")]
        if part == 1.0:
            asked.insert(0, ("instruction", "What is the robot told to do?", instruction))
        if (now := str(dataset.primitives[last])) != "unknown":
            asked.append(("primitive", f"The task: {instruction} Which primitive is in progress?", now))
        pictures = tuple(_picture(dataset, episode, row, camera) for row in rows)
        messages = [
            message
            for place, (_, question, answer) in enumerate(asked)
            for message in (
                Message("user", (question,) if place else (*pictures, question)),
                Message("assistant", (answer,)),
            )
        ]
        yield Conversation(
            id=f"{name}/{camera}/{part:.0%}",
            group=group,
            source=settings.source or "lerobot",
            kinds=tuple(kind for kind, _, _ in asked),
            messages=tuple(messages),
            independent=True,
        )


def _picture(dataset: EpisodeDataset, episode: int, row: int, camera: str) -> Image:
    camera_videos = dataset.camera_videos.get(camera)
    if camera_videos is None or np.count_nonzero(camera_videos.file == camera_videos.file[episode]) > 1:
        return Image(dataset.frames([row], camera)[0])
    number = int(camera_videos.first[episode]) + row - int(dataset.starts[episode])
    file = camera_videos.files[int(camera_videos.file[episode])].relative_to(dataset.folder).as_posix()
    middle = (number + 0.5) / dataset.space.rate_hz  # not the frame's edge: times in files are rounded
    return Image(path=f"{file}#t={middle:.4f}")
