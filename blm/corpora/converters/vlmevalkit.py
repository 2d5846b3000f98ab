"""Converter of VLMEvalKit tables: one question a row, its pictures as base64 or paths.

Columns: index, image (base64, or a list of these, or the index of another row) or image_path,
question, hint, the options A to Z, answer, category, split.
"""

from __future__ import annotations

import json
import string
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from blm.corpora.converters.cosmos import OPTION_PROMPT
from blm.corpora.converters.media_files import MediaFolders, from_base64
from blm.corpora.converters.reading import read_rows
from blm.corpora.converters.report import Tally
from blm.corpora.converters.rows import ConverterConfig, Rows, conversation
from blm.corpora.converters.turns import Medium, Part
from blm.corpora.format.faults import RowError
from blm.corpora.format.messages import Conversation, check_text, check_turns
from blm.types import Image, Message

INDEX_LENGTH = 64
"""Maximum length of an index of another row; longer texts are pictures."""
USES = {
    **dict.fromkeys(("image", "image_path"), "pictures"),
    **dict.fromkeys(("question", "hint"), "question"),
    **dict.fromkeys(string.ascii_uppercase, "options"),
    "answer": "answer",
    "index": "id",
    "category": "kind",
}


def vlmevalkit(source: Path, settings: ConverterConfig, tally: Tally) -> Rows:
    """Convert tables of questions."""
    folders = MediaFolders(source, settings, tally)
    name = settings.source or "vlmevalkit"
    with tempfile.TemporaryFile() as spool:
        pictures = _Pictures(spool)
        for where, identity, row in read_rows(source, tally):
            try:
                if isinstance(row, RowError):
                    raise row
                if not isinstance(row, Mapping):
                    raise RowError("malformed row", f"it is {type(row).__name__}, no object")
                shown = [
                    image
                    for value in pictures.of(row)
                    for image in folders.images(Medium("image", value), folders.of_rows(where))
                ]
                made = _conversation(row, shown, f"vlmevalkit/{identity}", name)
                tally.count(row, USES)
                yield where, made
            except RowError as error:
                yield where, error


class _Pictures:
    """The pictures of a table. Rows may refer to earlier rows by index, so they are kept in a file."""

    def __init__(self, spool: IO[bytes]) -> None:
        self._spool = spool
        self._places: dict[str, tuple[int, int]] = {}

    def of(self, row: Mapping[str, Any]) -> list[Any]:
        """Return the pictures of a row: contents or paths."""
        cell = row.get("image")
        if cell in (None, ""):
            return _listed(row.get("image_path"))
        if isinstance(cell, str) and len(cell) <= INDEX_LENGTH and not cell.startswith("["):
            return self._of_row(cell)
        found = [from_base64(one) if isinstance(one, str) else one for one in _listed(cell)]
        data = json.dumps([one.hex() for one in found if isinstance(one, bytes)]).encode()
        if row.get("index") is not None and len(found) == sum(isinstance(one, bytes) for one in found):
            self._places[str(row["index"])] = (self._spool.seek(0, 2), len(data))
            self._spool.write(data)
        return found

    def _of_row(self, index: str) -> list[Any]:
        if index not in self._places:
            raise RowError("media missing", f"the picture of row {index!r}, which is no earlier row")
        begin, length = self._places[index]
        self._spool.seek(begin)
        return [bytes.fromhex(one) for one in json.loads(self._spool.read(length))]


def _listed(cell: Any) -> list[Any]:
    """Return the items of a cell: a value, a list, or a list as a text."""
    if isinstance(cell, str) and cell.startswith("["):
        try:
            cell = json.loads(cell.replace("'", '"'))
        except ValueError:
            raise RowError("malformed row", f"a list of pictures is {cell[:60]!r}") from None
    return list(cell) if isinstance(cell, list) else [] if cell in (None, "") else [cell]


def _conversation(row: Mapping[str, Any], shown: list[Image], identity: str, name: str) -> Conversation:
    question, answer = (row.get(key) for key in ("question", "answer"))
    if question is None or answer is None:
        raise RowError("malformed row", f"a question and its answer are needed; it has {', '.join(row)}")
    options = [letter for letter in string.ascii_uppercase if row.get(letter) is not None]
    lines = [check_text(str(text)) for text in (row.get("hint"), question) if text]
    kind = str(row.get("category") or name).lower().replace(" ", "_")
    if options:
        if str(answer) not in options:
            raise RowError("malformed row", f"answer {answer!r} is no option; there are {', '.join(options)}")
        lines += [*(f"({letter}) {row[letter]}" for letter in options), OPTION_PROMPT]
        kind += "_choice"
    content: tuple[Part | Image, ...] = (*shown, "\n".join(lines))
    asked = Message("user", content)  # type: ignore[arg-type]
    messages = (asked, Message("assistant", (check_text(str(answer)),)))
    check_turns(messages)
    return conversation(identity, messages, name, kind=kind)
