"""Converters of ShareRobot: planning, affordance and trajectory rows, as BAAI publishes them.

The source of planning is a folder `planning/{train,test}` of JSON arrays of {"id":
".../rt_frames_success/<shard>/<episode>", "task", "selected_step", "conversations", "image": [up to
30 frames]}. The first question begins with one `<image>` per frame, or with `<image 0-25>` for all
frames. Frames are paths that contain "rt_frames_success/". The part before it is a path on the
publisher's disk and is dropped: the media folder is the one that contains `rt_frames_success`.

Affordance rows are {"id": picture, "meta_data": {"original_width", "original_height"},
"instruction", "affordance": {"x", "y", "width", "height"}}, trajectory rows have "points" instead,
all in pixels of the original picture. They have no question, so these converters write one.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blm.corpora.converters.grounding import Size, coordinates
from blm.corpora.converters.media_files import MediaFolders
from blm.corpora.converters.reading import read_rows
from blm.corpora.converters.report import Tally
from blm.corpora.converters.rows import (
    ConverterConfig,
    Rows,
    conversation,
    evenly_spaced,
    media_list,
    media_root,
    require_field,
)
from blm.corpora.converters.turns import Medium, read_turns
from blm.corpora.format.faults import RowError
from blm.corpora.format.find_media import image_size
from blm.corpora.format.messages import Conversation, check_text, check_turns
from blm.corpora.format.writing import SourceImage
from blm.types import Image, Message

FRAMES = "rt_frames_success/"
_TAGS = re.compile(r"^\s*((?:<image>\s*)+|<image (\d+)-(\d+)>\s*)")


AREA = "Which area must the robot touch to {task}? Answer with its box (x1, y1, x2, y2)."
PATH = "Along which points does the gripper move to {task}? Answer with the points (x, y), in order."
ROUNDING = 0.02
"""Greatest relative difference between the shapes of an original picture and of the stored one."""


def sharerobot(source: Path, settings: ConverterConfig, tally: Tally) -> Rows:
    """Convert planning rows."""
    root, name = frames_root(source, settings), settings.source or "sharerobot"
    folders = MediaFolders(source, settings, tally)
    for where, identity, row in read_rows(source, tally):
        try:
            if isinstance(row, RowError):
                raise row
            kind = task_kind(require_field(row, "task", str))
            messages = _messages(row, root, settings, folders)
            episode = require_field(row, "id", str).split(FRAMES)[-1].strip("/")
            tally.count(row, {"conversations": "turns", "image": "frames", "task": "kind", "id": "group"})
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


def _messages(row: Any, root: Path, settings: ConverterConfig, folders: MediaFolders) -> tuple[Message, ...]:
    paths = media_list(row, "image", "images")
    turns = [turn for turn in read_turns(row, Tally())[0] if isinstance(turn.content, str)]
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise RowError("roles out of order", "no question")
    text = str(turns[first].content)
    found = _TAGS.match(text)
    tags = 0 if found is None else found[1].count("<image>")
    if found is not None and found[2]:  # a range stands for all frames of the row
        tags = len(paths)
    if tags != len(paths) or not paths:
        raise RowError("wrong media count", f"{tags} tags <image> for {len(paths)} frames")
    pictures = [
        image
        for path in evenly_spaced(paths, settings.frames)
        for image in folders.images(Medium("image", _path(path)), [root])
    ]
    messages = []
    for number, turn in enumerate(turns):
        asked: tuple[str | Image, ...] = (str(turn.content).strip(),)
        if number == first:
            assert found is not None
            asked = (*pictures, text[found.end() :].strip())
        if any("<image" in part for part in asked if isinstance(part, str)):
            raise RowError("wrong media count", f"a media tag in turn {number}, after the frames")
        messages.append(Message(turn.role, asked, turn.loss))  # type: ignore[arg-type]
    check_turns(messages)
    return tuple(messages)


def _path(path: Any) -> Any:
    return FRAMES + path.split(FRAMES)[-1] if isinstance(path, str) and FRAMES in path else path


def sharerobot_affordance(source: Path, settings: ConverterConfig, tally: Tally) -> Rows:
    """Convert affordance rows to questions for a box."""
    return _places(source, settings, tally, "sharerobot_affordance")


def sharerobot_trajectory(source: Path, settings: ConverterConfig, tally: Tally) -> Rows:
    """Convert trajectory rows to questions for points."""
    return _places(source, settings, tally, "sharerobot_trajectory")


def _places(source: Path, settings: ConverterConfig, tally: Tally, name: str) -> Rows:
    folders = MediaFolders(source, settings, tally)
    for where, identity, row in read_rows(source, tally):
        try:
            if isinstance(row, RowError):
                raise row
            made = _place(row, f"{name}/{identity}", settings.source or name, folders, folders.of_rows(where))
            uses = {"affordance": "box", "points": "points", "instruction": "question", "meta_data": "scale"}
            tally.count(row, uses | dict.fromkeys(("id", "image", "image_path"), "picture"))
            yield where, made
        except RowError as error:
            yield where, error


def _place(row: Any, identity: str, source: str, folders: MediaFolders, near: Sequence[Path]) -> Conversation:
    """Return the question of an affordance or trajectory row, with coordinates in our form."""
    task = check_text(require_field(row, "instruction", str)).strip().rstrip(".")
    pictures = media_list(row, "image", "image_path", "images", "id")
    if len(pictures) != 1:
        raise RowError("wrong media count", f"{len(pictures)} pictures; one is needed")
    (picture,) = folders.images(Medium("image", pictures[0]), near)
    size = _original_size(row, folders.picture(pictures[0], near))
    if "affordance" in row:
        area = require_field(row, "affordance", dict)
        x, y, width, height = (
            require_field(area, key, (int, float)) for key in ("x", "y", "width", "height")
        )
        text, kind, answer = AREA, "box_affordance", coordinates([x, y, x + width, y + height], size)
    else:
        points = require_field(row, "points", list)
        if len(points) < 2 or not all(isinstance(point, list) and len(point) == 2 for point in points):
            raise RowError("unclear coordinates", f"'points' are {str(points)[:60]}")
        text, kind = PATH, "trajectory"
        answer = ", ".join(coordinates(point, size) for point in points)
    asked = Message("user", (picture, text.format(task=task)))
    return conversation(identity, (asked, Message("assistant", (answer,))), source, kind=kind)


def _original_size(row: Any, picture: SourceImage) -> Size:
    """Return the size that coordinates refer to.

    Raises RowError if the picture has another shape, because it is then a part of the original.
    """
    shown = image_size(picture.file or io.BytesIO(picture.encoded), str(picture.path))
    meta = require_field(row, "meta_data", dict) if row.get("meta_data") else {}
    sides = [meta.get(key) for key in ("original_width", "original_height")]
    if sides == [None, None]:
        if shown is None:
            raise RowError("unclear coordinates", "the size of the picture is not known")
        return shown
    if not all(isinstance(side, int | float) and side >= 1 for side in sides):
        raise RowError("unclear coordinates", f"an original of {sides[0]!r} x {sides[1]!r} px")
    width, height = meta["original_width"], meta["original_height"]
    if shown is not None and abs(shown[0] * height / (shown[1] * width) - 1) > ROUNDING:
        raise RowError("unclear coordinates", f"a picture of {shown} and an original of {width} x {height}")
    return width, height
