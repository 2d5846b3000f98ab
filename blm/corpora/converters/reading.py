"""Rows of published files: JSON arrays, JSONL, parquet and tab-separated tables.

Parquet and tables are read a few rows at a time, JSONL line by line; only a JSON array is in memory
as a whole.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blm.corpora.converters.report import Tally
from blm.corpora.format.faults import RowError
from blm.corpora.format.messages import parse_json_line
from blm.types import BlmError

PARQUET_ROWS = 16
"""Rows of a parquet file that are in memory at once; a row may hold many pictures."""
CELL = 1 << 30
"""Maximum length of a cell of a table [characters]; pictures are in cells."""
IN_FOLDERS = (".json", ".jsonl", ".parquet", ".tsv")
"""Endings of the files that are read in a folder; .csv often describes other files there."""
ReadRows = Iterator[tuple[str, str, Any | RowError]]
"""Yields place, id and row: a JSON value, or the fault of its line."""


def read_rows(source: Path, tally: Tally) -> ReadRows:
    """Yield the rows of a file, or of a folder with files, in the order of their names.

    A JSON file in a folder that holds an object, such as a description of the data, is no file of
    rows: it is noted. Raises BlmError for a missing source, a source without files of rows, and a
    file that cannot be read at all.
    """
    if not source.exists():
        raise BlmError(f"'{source}' does not exist; name a file of rows, or the folder of them")
    files = [source] if source.is_file() else sorted(f for f in source.rglob("*") if f.suffix in IN_FOLDERS)
    if not files:
        raise BlmError(f"'{source}' holds no file that ends in {', '.join(IN_FOLDERS)}")
    for file in files:
        name = file.name if file == source else file.relative_to(source).as_posix()
        if file != source and file.suffix == ".json" and _is_object(file):
            tally.note(f"not read, it holds no rows: {name}")
            continue
        for number, row in _READERS.get(file.suffix.lower(), _json_array)(file):
            yield f"{file}:{number}", f"{name}:{number}", row


def _is_object(file: Path) -> bool:
    """Return whether a JSON file begins as an object, which is the case if it is no list of rows."""
    with file.open("rb") as stream:
        return stream.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


def _jsonl(file: Path) -> Iterator[tuple[int, Any | RowError]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    yield number, parse_json_line(line)
                except RowError as error:
                    yield number, error


def _json_array(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BlmError(f"'{file}' cannot be read as JSON ({error}); it is truncated or altered") from error
    if not isinstance(rows, list):
        raise BlmError(f"'{file}' holds a {type(rows).__name__}, not a list of rows; name files of rows")
    yield from enumerate(rows, start=1)


def _parquet(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        number = 0
        for batch in table.iter_batches(batch_size=PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise BlmError(f"'{file}' cannot be read as parquet ({error}); it is truncated or altered") from error


def _table(file: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(CELL)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream, dialect="excel" if file.suffix == ".csv" else "excel-tab")
        try:
            for number, row in enumerate(rows, start=1):
                if None in row or None in row.values():
                    yield number, RowError("malformed row", "it has more or fewer cells than the heading")
                else:
                    yield number, {name: cell for name, cell in row.items() if cell != ""}
        except (csv.Error, UnicodeDecodeError) as error:
            raise BlmError(f"'{file}' cannot be read as a table ({error})") from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".json": _json_array,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".tsv": _table,
    ".csv": _table,
}
"""File ending -> reader; a file of another ending is read as a JSON array if it is named itself."""
