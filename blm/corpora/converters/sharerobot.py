"""ShareRobot planning rows, as BAAI publishes them on the Hugging Face hub.

A folder `planning/{train,test}` of JSON arrays of {"id": ".../rt_frames_success/<shard>/<episode>", "task",
"selected_step", "conversations", "image": [up to 30 frames]}. The first question begins with one `<image>`
a frame, or with `<image 0-25>` for all of them. Frames are paths that hold "rt_frames_success/"; what stands
before it is the publisher's disk and is dropped: the media folder is the one with `rt_frames_success` in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blm.corpora.converters.rows import (
    Rows,
    Settings,
    conversation,
    field,
    media_list,
    media_root,
    read_json_rows,
    read_turns,
    show,
)
from blm.corpora.format.faults import RowError
from blm.corpora.format.messages import check_text, check_turns
from blm.types import Image, Message

FRAMES = "rt_frames_success/"
_TAGS = re.compile(r"^\s*((?:<image>\s*)+|<image (\d+)-(\d+)>\s*)")


def sharerobot(source: Path, settings: Settings) -> Rows:
    root, name = frames_root(source, settings), settings.source or "sharerobot"
    for where, identity, row in read_json_rows(source):
        try:
            if isinstance(row, RowError):
                raise row
            kind = kind_of(field(row, "task", str))
            messages = _messages(row, root, settings)
            episode = field(row, "id", str).split(FRAMES)[-1].strip("/")
            yield where, conversation(f"sharerobot/{identity}", messages, name, group=episode, kind=kind)
        except RowError as error:
            yield where, error


def frames_root(source: Path, settings: Settings) -> Path:
    """Return the folder that holds `rt_frames_success`: that of the media, or one near the rows."""
    root = media_root(source, settings)
    places = [root / part for part in ("", "images", "planning/images", "planning", "../images", "..")]
    found = next((place for place in places if (place / FRAMES).is_dir()), root)
    return Path(os.path.normpath(found))


def kind_of(task: str) -> str:
    """'Discriminative_Affordance_(Positive)_Task' -> 'discriminative_affordance_positive'."""
    words = re.findall(r"[a-z]+", task.lower())
    return "_".join(words[:-1] if words[-1:] == ["task"] else words)


def pick(paths: Sequence[str], count: int) -> list[str]:
    """Return at most `count` of the frames, evenly spaced with the first and last among them; 0: all."""
    if not count or len(paths) <= count:
        return list(paths)
    places = np.linspace(0, len(paths) - 1, count).round().astype(int) if count > 1 else [len(paths) - 1]
    return [paths[int(place)] for place in places]


def _messages(row: Any, root: Path, settings: Settings) -> tuple[Message, ...]:
    paths = media_list(row, "image", "images")
    turns = [(role, check_text(text)) for role, text in read_turns(field(row, "conversations", list))]
    first = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
    if first is None:
        raise RowError("roles out of order", "no question")
    text = turns[first][1]
    found = _TAGS.match(text)
    tags = 0 if found is None else found[1].count("<image>")
    if found is not None and found[2]:  # a range stands for all frames of the row
        tags = len(paths)
    if tags != len(paths) or not paths:
        raise RowError("wrong media count", f"{tags} tags <image> for {len(paths)} frames")
    pictures = [
        image for path in pick(paths, settings.frames) for image in show("image", _path(path), root, settings)
    ]
    messages = []
    for turn, (role, said) in enumerate(turns):
        asked: tuple[str | Image, ...] = (said.strip(),)
        if turn == first:
            assert found is not None
            asked = (*pictures, said[found.end() :].strip())
        if any("<image" in part for part in asked if isinstance(part, str)):
            raise RowError("wrong media count", f"a media tag in turn {turn}, after the frames")
        messages.append(Message(role, asked))  # type: ignore[arg-type]
    check_turns(messages)
    return tuple(messages)


def _path(path: str) -> str:
    return FRAMES + path.split(FRAMES)[-1] if FRAMES in path else path
