"""Converter of ShareRobot planning rows, as BAAI publishes them on the Hugging Face hub.

The source is a folder `planning/{train,test}` of JSON arrays of {"id":
".../rt_frames_success/<shard>/<episode>", "task", "selected_step", "conversations", "image": [up to
30 frames]}. The first question begins with one `<image>` per frame, or with `<image 0-25>` for all
frames. Frames are paths that contain "rt_frames_success/". The part before it is a path on the
publisher's disk and is dropped: the media folder is the one that contains `rt_frames_success`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from blm.corpora.converters.rows import (
    ConverterConfig,
    Rows,
    conversation,
    evenly_spaced,
    image_references,
    media_list,
    media_root,
    read_json_rows,
    read_turns,
    require_field,
)
from blm.corpora.format.faults import RowError
from blm.corpora.format.messages import check_text, check_turns
from blm.types import Image, Message

FRAMES = "rt_frames_success/"
_TAGS = re.compile(r"^\s*((?:<image>\s*)+|<image (\d+)-(\d+)>\s*)")


def sharerobot(source: Path, settings: ConverterConfig) -> Rows:
    """Convert planning rows."""
    root, name = frames_root(source, settings), settings.source or "sharerobot"
    for where, identity, row in read_json_rows(source):
        try:
            if isinstance(row, RowError):
                raise row
            kind = task_kind(require_field(row, "task", str))
            messages = _messages(row, root, settings)
            episode = require_field(row, "id", str).split(FRAMES)[-1].strip("/")
            yield where, conversation(f"sharerobot/{identity}", messages, name, group=episode, kind=kind)
        except RowError as error:
            yield where, error


def frames_root(source: Path, settings: ConverterConfig) -> Path:
    """Return the folder that contains `rt_frames_success`: the media folder, or one nearby."""
    root = media_root(source, settings)
    places = [root / part for part in ("", "images", "planning/images", "planning", "../images", "..")]
    found = next((place for place in places if (place / FRAMES).is_dir()), root)
    return Path(os.path.normpath(found))


def task_kind(task: str) -> str:
    """Return a task as a kind: 'Future_Prediction_Task' -> 'future_prediction'."""
    words = re.findall(r"[a-z]+", task.lower())
    return "_".join(words[:-1] if words[-1:] == ["task"] else words)


def _messages(row: Any, root: Path, settings: ConverterConfig) -> tuple[Message, ...]:
    paths = media_list(row, "image", "images")
    turns = [(role, check_text(text)) for role, text in read_turns(require_field(row, "conversations", list))]
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
        image
        for path in evenly_spaced(paths, settings.frames)
        for image in image_references("image", _path(path), root, settings)
    ]
    messages = []
    for turn, (role, text) in enumerate(turns):
        asked: tuple[str | Image, ...] = (text.strip(),)
        if turn == first:
            assert found is not None
            asked = (*pictures, text[found.end() :].strip())
        if any("<image" in part for part in asked if isinstance(part, str)):
            raise RowError("wrong media count", f"a media tag in turn {turn}, after the frames")
        messages.append(Message(role, asked))  # type: ignore[arg-type]
    check_turns(messages)
    return tuple(messages)


def _path(path: str) -> str:
    return FRAMES + path.split(FRAMES)[-1] if FRAMES in path else path
