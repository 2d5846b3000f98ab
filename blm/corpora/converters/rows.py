"""Shared by all converters: their settings, required fields, and conversations from messages."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from blm.corpora.format.faults import RowError
from blm.corpora.format.messages import Conversation
from blm.media import split_time
from blm.types import Message, require_numbers

Item = TypeVar("Item")
Rows = Iterator[tuple[str, Conversation | RowError]]
"""Yields the place of each row ("file.json:17") and its conversation, or its fault."""


@dataclass(frozen=True, kw_only=True)
class ConverterConfig:
    """How rows are converted to conversations."""

    frames: int = 8
    """Number of frames per video, from the middles of equal parts, unless the row gives a number or
    a rate itself. Lists of frames (ShareRobot) are subsampled evenly, including the first and the
    last frame; 0 uses the whole list."""
    media: Path | None = None
    """Folder that media references are relative to. By default several folders around the source
    are tried (blm.corpora.converters.media_files)."""
    source: str = ""
    """Name of the source in the rows. Default: the converter's name. It is also the kind of
    questions whose rows have no kind."""
    untagged: Literal["refuse", "first"] = "refuse"
    """Treatment of rows with media but no tag: a fault, or the media before the first question."""
    independent: bool = False
    """Whether no turn of a row refers to another one, so that each is trained as if it were asked
    alone. Only you know; by default a row is one dialogue."""
    cameras: tuple[str, ...] = ()
    """Cameras of a robot dataset. Default: the first camera."""

    def __post_init__(self) -> None:
        require_numbers(self, frames=(0, 100_000))


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
    root = settings.media or (source if source.is_dir() else source.parent)
    return Path(os.path.normpath(root.absolute()))


def require_field(row: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """Return `row[key]`. Raises RowError if it is missing or of another type."""
    if not isinstance(row, Mapping) or not isinstance(row.get(key), kind):
        found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise RowError("malformed row", f"'{key}' is missing or of another type; it has {found}")
    return row[key]


def media_list(row: Mapping[str, Any], *keys: str) -> list[Any]:
    """Return the media under the first of `keys` in the row: one, or a list.

    A medium is a reference, a mapping with its bytes, or the list of a video's frames.
    """
    value: Any = next((row[key] for key in keys if row.get(key)), [])
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | Mapping | bytes | list) and item for item in values):
        raise RowError("malformed row", f"media under {' or '.join(keys)} are {str(value)[:60]!r}, no paths")
    return values


def conversation(
    identity: str,
    messages: tuple[Message, ...],
    source: str,
    *,
    group: str = "",
    kind: str = "",
    independent: bool = False,
) -> Conversation:
    """Return a conversation.

    The default group is its first media file, the default kind the source.
    """
    media = [str(image.path) for message in messages for image in message.images if image.path]
    first = f"{source}/{split_time(media[0])[0]}" if media else identity
    answers = sum(message.role == "assistant" for message in messages)
    return Conversation(
        id=identity,
        group=group or first,
        source=source,
        kinds=(kind or source,) * answers,
        messages=messages,
        independent=independent,
    )
