"""Readers of published benchmark files (JSON, JSON lines, parquet) and their images and clips.

Every problem is a BlmError that names the file, the row (counted from 1) and the rule. Nothing is
skipped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from blm.io import write_bytes
from blm.media import frame_references, locate, video_seconds
from blm.types import BlmError, Image

UNPACKED = "unpacked"
"""Folder, next to the parquet files, for the images stored inside them."""


@dataclass(frozen=True)
class Row:
    """One published row, and its place in the file."""

    where: str
    data: Mapping[str, Any]

    def error(self, rule: str) -> BlmError:
        return BlmError(f"{self.where}: {rule}")

    def field(self, name: str) -> Any:
        """Return a field. Raises BlmError, which lists the fields of the row, when it is missing."""
        if self.data.get(name) is None:
            raise self.error(f"field '{name}' is missing; present: {', '.join(self.data) or 'none'}")
        return self.data[name]

    def text(self, name: str) -> str:
        """Return a field that is a non-empty text, or an integer (of an id)."""
        value = self.field(name)
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
            raise self.error(f"field '{name}' is {value!r}; needed: a text that is not empty")
        return str(value).strip()

    def items(self, name: str) -> list[Any]:
        """Return a field that is a non-empty list."""
        value = self.field(name)
        if not isinstance(value, list) or not value:
            raise self.error(f"field '{name}' is {str(value)[:80]!r}; needed: a list that is not empty")
        return value

    def file(self, reference: str, folder: Path) -> str:
        """Return `reference`. Raises BlmError unless it names a file below `folder`."""
        try:
            path = locate(reference, folder)
        except BlmError as error:
            raise self.error(str(error)) from error
        if not path.is_file():
            raise self.error(f"'{reference}' is not in '{folder}'")
        return reference

    def frames(self, clip: str, folder: Path, *, rate: float, most: int) -> list[Image]:
        """Return frames of a clip: `rate` per second, evenly spaced, at least one, at most `most`."""
        path = locate(self.file(clip, folder), folder)
        try:
            count = min(max(round(rate * video_seconds(path)), 1), most)
            return [Image(path=reference) for reference in frame_references(clip, folder, count)]
        except BlmError as error:
            raise self.error(str(error)) from error

    def picture(self, value: Any, folder: Path) -> Image:
        """Return an image: a path below `folder`, or {"bytes", "path"} as parquet stores it.

        The latter is written once to `folder`/unpacked and named by a hash of its content: equal
        images get equal references.
        """
        if isinstance(value, str) and value:
            return Image(path=self.file(value, folder))
        content = value.get("bytes") if isinstance(value, dict) else None
        if not isinstance(content, bytes) or not content:
            raise self.error(f"an image is {str(value)[:80]!r}; needed: a path, or bytes of an image")
        suffix = Path(value.get("path") or "").suffix or ".png"
        name = f"{UNPACKED}/{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
        if not (folder / name).exists():
            write_bytes(folder / name, content)
        return Image(path=name)


def read_rows(file: Path, get: str) -> list[Row]:
    """Return the rows of a file, which must be objects. Raises BlmError like `read_values`."""
    rows = []
    for where, value in read_values(file, get):
        if not isinstance(value, dict):
            raise BlmError(f"{where}: it is {str(value)[:80]!r}; needed: an object")
        rows.append(Row(where, value))
    return rows


def read_values(file: Path, get: str) -> list[tuple[str, Any]]:
    """Return the place and the value of each row of a .json (a list), .jsonl or .parquet file.

    Raises BlmError, whose message ends in `get`, for a file that is missing, cannot be read or is
    empty.
    """
    if not file.is_file():
        raise BlmError(f"'{file}' is missing. {get}")
    try:
        values = _READERS[file.suffix](file)
    except (ValueError, OSError) as error:  # of JSON, Unicode, Arrow and the disk
        raise BlmError(f"cannot read '{file}': {error}; it is damaged. {get}") from error
    if not isinstance(values, list) or not values:
        raise BlmError(f"'{file}' has no rows; needed: a list with at least one. {get}")
    return [(f"{file}, row {number}", value) for number, value in enumerate(values, start=1)]


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _read_jsonl(file: Path) -> Any:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
    return rows


def _read_parquet(file: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(file).to_pylist()


_READERS: Mapping[str, Callable[[Path], Any]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def find_files(folder: Path, patterns: Sequence[str], get: str) -> list[Path]:
    """Return the files of the first pattern with a match, sorted.

    Raises BlmError without a match.
    """
    for pattern in patterns:
        if found := sorted(folder.glob(pattern)):
            return found
    raise BlmError(f"'{folder}' has none of {', '.join(patterns)}. {get}")


def letter_of(row: Row, answer: str, options: Sequence[str]) -> str:
    """Return the reference answer as a letter. Raises BlmError unless it names an option."""
    letters = list(ascii_uppercase[: len(options)])
    letter = answer.strip(" ().").upper()
    if letter not in letters:
        raise row.error(f"answer {answer!r} is not the letter of an option; valid: {', '.join(letters)}")
    return letter
