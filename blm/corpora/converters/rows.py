"""Shared by all converters: rows of JSON files, and texts with media tags.

A tag `<image>` or `<video>` in a question stands for the next file of the row's list. A video
becomes evenly spaced frame references. Nothing is guessed: if the numbers of tags and files differ,
the row is faulty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from blm.corpora.format.faults import RowError
from blm.corpora.format.find_media import find_media
from blm.corpora.format.messages import Conversation, check_text, check_turns, parse_json_line
from blm.media import frame_references, split_time
from blm.types import BlmError, Image, Message, require_numbers

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
"""Role names in published rows -> our three roles."""
Item = TypeVar("Item")
_TAG = re.compile(r"<(image|video)>")
Rows = Iterator[tuple[str, Conversation | RowError]]
"""Yields the place of each row ("file.json:17") and its conversation, or its fault."""


@dataclass(frozen=True, kw_only=True)
class ConverterConfig:
    """How rows are converted to conversations."""

    frames: int = 8
    """Number of frames per video, from the middles of equal parts. Lists of frames (ShareRobot) are
    subsampled evenly, including the first and the last frame; 0 uses the whole list."""
    media: Path | None = None
    """Folder that media references are relative to; by default that of the source or file."""
    source: str = ""
    """Name of the source in the rows. Default: the converter's name. It is also the kind of
    questions whose rows have no kind."""
    untagged: Literal["refuse", "first"] = "refuse"
    """Treatment of rows with media but no tag: a fault, or the media before the first question."""
    cameras: tuple[str, ...] = ()
    """Cameras of a robot dataset. Default: the first camera."""

    def __post_init__(self) -> None:
        require_numbers(self, frames=(0, 100_000))


def read_json_rows(source: Path) -> Iterator[tuple[str, str, Any | RowError]]:
    """Yield place, id and row of a JSON array, a JSONL file or a folder of these.

    Raises BlmError for a missing source and for a file without rows.
    """
    if not source.exists():
        raise BlmError(f"'{source}' does not exist; name the JSON or JSONL file, or the folder of them")
    files = (
        [source] if source.is_file() else sorted(f for s in ("json", "jsonl") for f in source.rglob(f"*.{s}"))
    )
    if not files:
        raise BlmError(f"'{source}' holds no .json or .jsonl file")
    for file in files:
        name = file.name if file == source else file.relative_to(source).as_posix()
        for number, row in _read_jsonl(file) if file.suffix == ".jsonl" else _read_json_array(file):
            yield f"{file}:{number}", f"{name}:{number}", row


def _read_jsonl(file: Path) -> Iterator[tuple[int, Any | RowError]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    yield number, parse_json_line(line)
                except RowError as error:
                    yield number, error


def _read_json_array(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BlmError(f"'{file}' cannot be read as JSON ({error}); it is truncated or altered") from error
    if not isinstance(rows, list):
        raise BlmError(f"'{file}' holds a {type(rows).__name__}, not a list of rows; name files of rows")
    yield from enumerate(rows, start=1)


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most `count` evenly spaced items, including the first and the last.

    If `count` is 0, return all items.
    """
    if not count or len(items) <= count:
        return list(items)
    places = np.linspace(0, len(items) - 1, count).round().astype(int) if count > 1 else [len(items) - 1]
    return [items[int(place)] for place in places]


def media_root(source: Path, settings: ConverterConfig) -> Path:
    """Return the folder that media references are relative to."""
    return (settings.media or (source if source.is_dir() else source.parent)).absolute()


def require_field(row: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """Return `row[key]`. Raises RowError if it is missing or of another type."""
    if not isinstance(row, Mapping) or not isinstance(row.get(key), kind):
        found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise RowError("malformed row", f"'{key}' is missing or of another type; it has {found}")
    return row[key]


def media_list(row: Mapping[str, Any], *keys: str) -> list[str]:
    """Return the media references under the first of `keys` in the row: a text or a list of texts."""
    value: Any = next((row[key] for key in keys if row.get(key)), [])
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) and item for item in values):
        raise RowError("malformed row", f"media under {' or '.join(keys)} are {str(value)[:60]!r}, no paths")
    return values


def read_turns(turns: Any) -> list[tuple[str, Any]]:
    """Return (role, content) of turns that have "from" and "value", or "role" and "content"."""
    found = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not (
            {"from", "value"} <= set(turn) or {"role", "content"} <= set(turn)
        ):
            raise RowError("malformed row", f"a turn is {str(turn)[:60]!r}: from/value or role/content")
        keys = ("from", "value") if "from" in turn else ("role", "content")
        name, content = (turn[key] for key in keys)
        if name not in ROLES:
            raise RowError("unknown role", f"role {name!r}; valid: {', '.join(ROLES)}")
        found.append((ROLES[name], content))
    return found


def tagged_messages(
    turns: Sequence[tuple[str, str]],
    media: Mapping[str, Sequence[str]],
    root: Path,
    settings: ConverterConfig,
) -> tuple[Message, ...]:
    """Return messages in which each tag is replaced by the next file of its kind.

    `media` maps "image" and "video" to references. Raises RowError if the numbers of tags and files
    differ, and for missing or unreadable media.
    """
    queues = {kind: list(files) for kind, files in media.items()}
    texts = [(role, check_text(text)) for role, text in turns]
    tags = [tag for role, text in texts if role == "user" for tag in _TAG.findall(text)]
    if not tags and settings.untagged == "first":
        lead = "".join(f"<{kind}>" for kind, files in queues.items() for _ in files)
        first = next((i for i, (role, _) in enumerate(texts) if role == "user"), 0)
        texts[first : first + 1] = [(role, lead + text) for role, text in texts[first : first + 1]]
        tags = _TAG.findall(lead)
    for kind, files in queues.items():
        if tags.count(kind) != len(files):
            hint = "; --untagged first shows them first" if not tags else ""
            raise RowError(
                "wrong media count", f"{tags.count(kind)} tags <{kind}> for {len(files)} files{hint}"
            )
    messages = []
    for role, text in texts:
        if role != "user" and _TAG.search(text):
            raise RowError("wrong media count", f"a media tag in the text of the {role}")
        parts: list[str | Image] = []
        for place, piece in enumerate(_TAG.split(text)):
            if place % 2:
                parts += image_references(piece, queues[piece].pop(0), root, settings)
            elif piece.strip():
                parts.append(piece.strip() if tags else piece)
        messages.append(Message(role, tuple(parts)))  # type: ignore[arg-type]
    check_turns(messages)
    return tuple(messages)


def image_references(kind: str, reference: str, root: Path, settings: ConverterConfig) -> list[Image]:
    """Return references to an image, or to the frames of a video.

    Raises RowError for missing files.
    """
    file = find_media(reference, root)
    if kind == "image":
        return [Image(path=reference)]
    try:
        return [Image(path=path) for path in frame_references(reference, root, settings.frames or 8)]
    except BlmError as error:
        raise RowError("media unreadable", f"{file}: {error}") from None


def conversation(
    identity: str,
    messages: tuple[Message, ...],
    source: str,
    *,
    group: str = "",
    kind: str = "",
) -> Conversation:
    """Return a conversation.

    The default group is its first media file, the default kind the source.
    """
    media = [image.path for message in messages for image in message.images]
    first = f"{source}/{split_time(str(media[0]))[0]}" if media else identity
    answers = sum(message.role == "assistant" for message in messages)
    kinds = (kind or source,) * answers
    return Conversation(id=identity, group=group or first, source=source, kinds=kinds, messages=messages)
