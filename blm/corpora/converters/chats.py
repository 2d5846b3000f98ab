"""Converter of dialogues in the formats of LLaVA, LLaMA-Factory, TRL, OpenAI, ms-swift and others.

The shape of each row decides how it is read (blm.corpora.converters.turns), so that one converter
reads them all; its names only differ in the default source and in what the row's files are called.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blm.corpora.converters.grounding import Size, convert_marks, fill_objects, read_objects
from blm.corpora.converters.media_files import MediaFolders, is_frames
from blm.corpora.converters.placing import place_media
from blm.corpora.converters.reading import read_rows
from blm.corpora.converters.report import Tally
from blm.corpora.converters.rows import ConverterConfig, Rows, conversation, media_list, require_field
from blm.corpora.converters.turns import Turn, read_turns
from blm.corpora.format.faults import RowError
from blm.corpora.format.find_media import image_size
from blm.corpora.format.loss import MASKS
from blm.corpora.format.messages import Conversation, check_turns
from blm.corpora.format.unsupported import require_supported
from blm.io import read_json
from blm.types import BlmError

IMAGES, VIDEOS = ("images", "image", "image_path"), ("videos", "video")
USES = {
    **dict.fromkeys(IMAGES, "pictures"),
    **dict.fromkeys(VIDEOS, "videos"),
    "objects": "coordinates in the texts",
    "kinds": "kinds",
    "group": "group",
    "independent": "independent turns",
    **dict.fromkeys(MASKS, "loss"),
}
Change = Callable[[Sequence[Turn]], list[Turn]]


def chats(
    source: Path, settings: ConverterConfig, tally: Tally, *, name: str, change: Change | None = None
) -> Rows:
    """Convert rows of dialogues; `change` converts the texts of one format."""
    reader = ChatReader(source, settings, tally, name=name, change=change)
    for where, identity, row in read_rows(source, tally):
        try:
            if isinstance(row, RowError):
                raise row
            yield where, reader.read(row, where, identity)
        except RowError as error:
            yield where, error


def finevision(source: Path, settings: ConverterConfig, tally: Tally) -> Rows:
    """Convert rows with "images" and "texts", which have no tags: the images are shown first."""
    return chats(source, replace(settings, untagged="first"), tally, name="finevision")


def internvl(source: Path, settings: ConverterConfig, tally: Tally) -> Rows:
    """Convert rows, or the files of rows that a JSON object of name -> root, annotation lists."""
    if not (source.is_file() and source.suffix == ".json" and isinstance(listed := read_json(source), dict)):
        yield from chats(source, settings, tally, name="internvl")
        return
    near = MediaFolders(source, settings, tally).of_rows(f"{source}:0")
    for name, entry in listed.items():
        keys = ("annotation", "root")
        paths = [entry[key] for key in keys if key in entry] if isinstance(entry, dict) else []
        if len(paths) != len(keys) or not all(isinstance(path, str) for path in paths):
            raise BlmError(f"'{source}': '{name}' is {str(entry)[:60]!r}, no object with root and annotation")
        rows, root = ([folder / path for folder in near if (folder / path).exists()] for path in paths)
        if not rows or not root:
            raise BlmError(
                f"'{source}': {paths} of '{name}' are not near it: --media the folder that has them"
            )
        tally.note(
            f"{name}: not used: {', '.join(sorted(entry.keys() - {'annotation', 'root'})) or 'nothing'}"
        )
        yield from chats(rows[0], replace(settings, media=root[0]), tally, name=f"internvl/{name}")


class ChatReader:
    """Reads rows of dialogues of one source."""

    def __init__(
        self,
        source: Path,
        settings: ConverterConfig,
        tally: Tally,
        *,
        name: str,
        change: Change | None = None,
    ) -> None:
        self.settings, self.tally, self.name, self.change = settings, tally, name, change
        self.folders = MediaFolders(source, settings, tally)

    def read(self, row: Any, where: str, identity: str) -> Conversation:
        """Return the conversation of a row. Raises RowError for a row that cannot be converted."""
        if not isinstance(row, Mapping):
            raise RowError("malformed row", f"it is {type(row).__name__}, no object")
        require_supported(row)
        own = Tally()
        turns, uses = read_turns(row, own)
        files = {"image": media_list(row, *IMAGES), "video": _videos(row, turns)}
        turns = place_media(turns, files, self.settings.untagged)
        folders = self.folders.of_rows(where)
        turns = convert_marks(fill_objects(turns, row.get("objects"), self._sizes(row, turns, folders)))
        messages = tuple(self.folders.message(turn, folders) for turn in (self.change or list)(turns))
        check_turns(messages)
        source = self.settings.source or self.name
        independent = row.get("independent", self.settings.independent)
        made = conversation(f"{self.name}/{identity}", messages, source, independent=bool(independent))
        made = _named(made, row)
        own.count(row, {**USES, **uses})
        self.tally.add(own)
        return made

    def _sizes(
        self, row: Mapping[str, Any], turns: Sequence[Turn], folders: Sequence[Path]
    ) -> list[Size | None]:
        """Return width and height of the row's pictures, if it has objects in pixels."""
        objects = read_objects(row.get("objects"))
        if not objects:
            return []
        sides = [objects.get(key) for key in ("width", "height")]
        if all(isinstance(side, int | float) and side >= 1 for side in sides):
            return [(objects["width"], objects["height"])]
        pictures = [
            self.folders.picture(medium.value, folders)
            for turn in turns
            for medium in turn.media
            if medium.kind == "image"
        ]
        return [image_size(one.file or io.BytesIO(one.encoded), str(one.path)) for one in pictures]


def _videos(row: Mapping[str, Any], turns: Sequence[Turn]) -> list[Any]:
    """Return the videos of a row; a list of pictures under one tag is the frames of one video."""
    videos = media_list(row, *VIDEOS)
    places = sum(turn.content.count("<video>") for turn in turns if isinstance(turn.content, str))
    places += sum(one.kind == "video" and one.value is None for turn in turns for one in turn.media)
    if len(videos) > 1 and places <= 1 and is_frames(videos):
        return [videos]
    return videos


def _named(made: Conversation, row: Mapping[str, Any]) -> Conversation:
    """Keep the group and the kinds of the row if it has any."""
    kinds = list(made.kinds)
    if isinstance(row.get("kinds"), list):
        kinds = row["kinds"]
    if len(kinds) != len(made.kinds) or not all(isinstance(kind, str) and kind for kind in kinds):
        raise RowError("wrong number of kinds", f"{kinds} for {len(made.kinds)} answers")
    group = require_field(row, "group", str) if row.get("group") is not None else made.group
    return replace(made, kinds=tuple(kinds), group=group)
