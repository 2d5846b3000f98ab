"""Writes corpus folders of the format that blm.corpora.format.messages reads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image

from blm.corpora.format.facts import facts_to_json
from blm.corpora.format.messages import CORPUS_FILE, Conversation, always_independent
from blm.io import MARK, new_folder, replacing, write_json
from blm.media import locate, split_time
from blm.types import BlmError, Image


@dataclass(frozen=True)
class SourceImage(Image):
    """An image that a corpus is to store under the name `path`, with `#t=` for a frame of a video."""

    file: Path | None = None
    """The file to store."""
    encoded: bytes = field(default=b"", repr=False)
    """The contents to store, without a file."""


def write_corpus(
    folder: Path,
    conversations: Iterable[Conversation],
    *,
    media: Path | None = None,
    notes: Mapping[str, Callable[[], Any]] | None = None,
) -> int:
    """Write a corpus folder atomically; return the number of conversations.

    Images in memory are stored as PNG files that are named by a hash of their content, so equal
    images are stored once, and a `SourceImage` under its own name. Media that are paths below the
    folder `media` are hard-linked, or copied to another disk; without `media`, paths are written
    unchanged. Media that a killed run stored are reused; an error leaves nothing behind. `notes`
    maps names of JSON files to what they hold, known once all conversations are written. Raises
    BlmError if `folder` exists: a corpus is never overwritten.
    """
    count = 0
    with new_folder(folder, resume=True) as work:
        stored: set[Path] = {work / CORPUS_FILE, work / MARK}
        with (work / CORPUS_FILE).open("w", encoding="utf-8") as file:
            for conversation in conversations:
                file.write(json.dumps(_to_row(conversation, work, media, stored)) + "\n")
                count += 1
        for name, content in (notes or {}).items():
            write_json(work / name, content())
            stored.add(work / name)
        for path in (path for path in work.rglob("*") if path.is_file() and path not in stored):
            path.unlink()  # left by an interrupted run with other rows
    return count


def _to_row(
    conversation: Conversation, folder: Path, media: Path | None, stored: set[Path]
) -> dict[str, Any]:
    def part_to_json(part: str | Image) -> dict[str, Any]:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return {"type": "image_url", "image_url": {"url": _store(part, folder, media, stored)}}

    known: dict[str, Any] = {}
    if conversation.training != "unknown":
        known["training"] = conversation.training
    if conversation.independent or always_independent(conversation.id, conversation.group):
        known["independent"] = conversation.independent
    return {
        "id": conversation.id,
        "group": conversation.group,
        "source": conversation.source,
        **known,
        "kinds": list(conversation.kinds),
        **facts_to_json(conversation.facts),
        "messages": [
            {
                "role": m.role,
                "content": [part_to_json(part) for part in m.content],
                **({} if m.loss else {"loss": False}),
            }
            for m in conversation.messages
        ],
    }


def _store(image: Image, folder: Path, media: Path | None, stored: set[Path]) -> str:
    """Store one image or video below `folder`; return its reference."""
    if isinstance(image, SourceImage):
        _store_source(image, folder, stored)
        return str(image.path)
    if image.pixels is None and media is None:
        return str(image.path)
    if image.pixels is not None:
        name = f"images/{hashlib.sha256(image.pixels.tobytes()).hexdigest()[:16]}.png"
        reference = name
    else:
        assert media is not None
        file = locate(str(image.path), media)
        name = file.relative_to(os.path.normpath(media)).as_posix()
        reference = name + str(image.path)[len(split_time(str(image.path))[0]) :]
    target = folder / name
    if target not in stored:
        stored.add(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        if image.pixels is None:
            _link(file, target)
        else:
            PIL.Image.fromarray(image.pixels).save(target, compress_level=1)
    return reference


def _store_source(image: SourceImage, folder: Path, stored: set[Path]) -> None:
    target = folder / split_time(str(image.path))[0]
    if target in stored:
        return
    stored.add(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if image.file is not None:
        _link(image.file, target)
    elif not target.exists() or target.read_bytes() != image.encoded:
        target.write_bytes(image.encoded)


def _link(source: Path, target: Path) -> None:
    if not source.is_file():
        raise BlmError(f"cannot store '{source}': the file is missing")
    source, there = source.resolve(), target.stat() if target.exists() else None
    have = source.stat()
    if there and (there.st_size, there.st_mtime_ns) == (have.st_size, have.st_mtime_ns):
        return
    target.unlink(missing_ok=True)  # left by a killed run; it may be a link to another file
    try:
        os.link(source, target)  # atomic; `replacing` lists the folder each time, which n files make n^2
    except OSError:  # another disk, or a file system without hard links
        with replacing(target) as temporary:
            shutil.copy2(source, temporary)
