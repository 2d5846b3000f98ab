"""Episodes of a LeRobotDataset: what the robot is told, how far it is, and what comes next.

Works for our own datasets and for foreign ones (v2.0, v2.1, v3.0), which say no more than an instruction. A
video that holds one episode is referred to; of a video with many, frames are stored as pictures, because
reading one frame late in it would decode all before. The rich questions about episodes are in
`blm.corpora.scenes.questions`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from blm.corpora.converters.rows import Rows, Settings
from blm.corpora.converters.sharerobot import pick
from blm.corpora.format.faults import RowError
from blm.corpora.format.messages import Conversation
from blm.datasets.dataset import EpisodeDataset
from blm.datasets.lerobot import open_dataset
from blm.types import BlmError, ContractError, Image, Message

PARTS = (0.25, 0.5, 0.75, 1.0)
"""Shares of an episode after which its progress is asked."""


def lerobot(source: Path, settings: Settings) -> Rows:
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
    dataset: EpisodeDataset, episode: int, camera: str, settings: Settings
) -> Iterator[Conversation]:
    first, end = int(dataset.starts[episode]), int(dataset.starts[episode + 1])
    instruction = dataset.instructions[int(dataset.task_index[first])].strip()
    name = f"lerobot/{dataset.folder.resolve().name}/{episode}"
    if dataset.seeds[episode] >= 0:  # ours: the group that questions about the same scene have
        group = f"episode/{dataset.space.robot}/{dataset.tasks[episode]}/{dataset.seeds[episode]}"
    else:
        group = name
    for part in PARTS:
        last = first + max(round(part * (end - first)), 1) - 1
        rows = _spread(first, last, settings.frames or 8)
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
        )


def _spread(first: int, last: int, count: int) -> list[int]:
    rows = [str(row) for row in range(first, last + 1)]
    return [int(row) for row in pick(rows, count)]


def _picture(dataset: EpisodeDataset, episode: int, row: int, camera: str) -> Image:
    footage = dataset.footage[camera]
    if np.count_nonzero(footage.file == footage.file[episode]) > 1:
        return Image(dataset.frames([row], camera)[0])
    number = int(footage.first[episode]) + row - int(dataset.starts[episode])
    file = footage.files[int(footage.file[episode])].relative_to(dataset.folder).as_posix()
    middle = (number + 0.5) / float(dataset.info["fps"])  # not its edge: times in files are rounded
    return Image(path=f"{file}#t={middle:.4f}")
