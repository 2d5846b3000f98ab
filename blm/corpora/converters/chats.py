"""Converters of LLaVA, ShareGPT, OpenAI and LLaMA-Factory corpora."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from blm.corpora.converters.rows import (
    ConverterConfig,
    Rows,
    conversation,
    media_list,
    media_root,
    read_json_rows,
    read_turns,
    require_field,
    tagged_messages,
)
from blm.corpora.format.faults import RowError
from blm.corpora.format.messages import Conversation, check_text
from blm.types import Message

_PARTS = {
    "text": "text",
    "image": "image",
    "image_url": "image_url",
    "video": "video",
    "video_url": "video_url",
}
"""Type of a content part -> the key of its value."""


def llava(source: Path, settings: ConverterConfig) -> Rows:
    """Convert rows with "conversations" of from/value and one media tag per file."""
    return _chats(source, settings, ("conversations",), "llava")


def sharegpt(source: Path, settings: ConverterConfig) -> Rows:
    """Convert LLaMA-Factory's ShareGPT rows, with media lists and a system prompt."""
    return _chats(source, settings, ("conversations", "messages"), "sharegpt")


def messages(source: Path, settings: ConverterConfig) -> Rows:
    """Convert rows with "messages" of role/content.

    A content is a text with tags or a list of parts.
    """
    return _chats(source, settings, ("messages",), "messages")


def _chats(source: Path, settings: ConverterConfig, keys: tuple[str, ...], name: str) -> Rows:
    root = media_root(source, settings)
    for where, identity, row in read_json_rows(source):
        try:
            if isinstance(row, RowError):
                raise row
            found = _messages(row, keys, root, settings)
            made = conversation(f"{name}/{identity}", found, settings.source or name)
            yield where, _named(made, row)
        except RowError as error:
            yield where, error


def _named(made: Conversation, row: Mapping[str, Any]) -> Conversation:
    """Keep the group and the kinds of the row if it has any."""
    kinds = require_field(row, "kinds", list) if "kinds" in row else list(made.kinds)
    if len(kinds) != len(made.kinds) or not all(isinstance(kind, str) and kind for kind in kinds):
        raise RowError("wrong number of kinds", f"{kinds} for {len(made.kinds)} answers")
    group = require_field(row, "group", str) if "group" in row else made.group
    return replace(made, kinds=tuple(kinds), group=group)


def _messages(row: Any, keys: tuple[str, ...], root: Path, settings: ConverterConfig) -> tuple[Message, ...]:
    key = next((key for key in keys if isinstance(row, Mapping) and key in row), keys[0])
    turns = read_turns(require_field(row, key, list))
    if unread := [name for name in ("tools", "audio", "audios") if row.get(name)]:
        raise RowError("unsupported content", f"the row has {', '.join(unread)}")
    if row.get("system"):
        turns = [("system", row["system"]), *turns]
    media = {"image": media_list(row, "images", "image"), "video": media_list(row, "videos", "video")}
    flat = [(role, _flatten(role, content, media)) for role, content in turns]
    return tagged_messages(flat, media, root, settings)


def _flatten(role: str, content: Any, media: dict[str, list[str]]) -> str:
    """Return a content as one text with tags; the files of its parts are appended to `media`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError("malformed row", f"a content is {type(content).__name__}, neither text nor list")
    return "".join(_parts(role, content, media))


def _parts(role: str, content: list[Any], media: dict[str, list[str]]) -> Iterator[str]:
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _PARTS:
            raise RowError("unsupported content", f"a part of type {kind!r}; valid: {', '.join(_PARTS)}")
        value = part.get(_PARTS[kind])
        if kind == "text":
            yield check_text(value)
            continue
        if kind.endswith("_url"):
            value = value.get("url") if isinstance(value, dict) else None
        if not isinstance(value, str) or not value:
            raise RowError("malformed row", f"a part of type {kind} names no file")
        name = kind.removesuffix("_url")
        media[name] = [*media[name], value]
        yield f"<{name}>"
