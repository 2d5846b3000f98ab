"""The index of a corpus: where its rows are and how long they are, memory-mapped.

A process that trains on a million rows cannot hold them as objects (134 kB for a row of eight
frames). It holds 28 bytes a row instead, in pages that all processes of a machine share, and reads
a row from the corpus file when it is used.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

from blm.corpora.format.faults import RowError
from blm.corpora.format.messages import CORPUS_FILE, Conversation, parse_json_line, parse_row
from blm.types import BlmError

PLACE = np.dtype([("offset", "<i8"), ("size", "<i4"), ("line", "<i4")])
"""Where a row is in the corpus file: the first byte, the number of bytes, the number of the line."""
MEASURED = np.dtype([*PLACE.descr, ("tokens", "<i4"), ("answers", "<i4"), ("video", "<i4")])
"""A row as one backbone reads it: its length [tokens], or 0 if it is not used; the tokens of its
answers; and whether it shows a video."""
T = TypeVar("T")
U = TypeVar("U")


class ReadOnDemand(Sequence[T]):
    """A sequence whose items are made whenever they are used. A slice is a list."""

    @abstractmethod
    def item(self, index: int) -> T:
        """Return one item."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.item(number) for number in range(len(self))[index]]
        return self.item(index)


class LazySequence(ReadOnDemand[T], Generic[T, U]):
    """`make(item)` for every item of a sequence."""

    def __init__(self, items: Sequence[U], make: Callable[[U], T]) -> None:
        self.items, self.make = items, make

    def __len__(self) -> int:
        return len(self.items)

    def item(self, index: int) -> T:
        return self.make(self.items[index])


class CorpusRows(ReadOnDemand[Conversation]):
    """The rows of a corpus that an index names, read and parsed whenever they are used.

    A copy in another process opens the files again.
    """

    def __init__(self, folder: Path, path: Path) -> None:
        """`path` is the index, a .npy file of `PLACE` or `MEASURED`."""
        self.folder, self.path = folder, path
        self.places: np.ndarray = np.load(path, mmap_mode="r")
        self._file = -1

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Conversation]:
        return (self[number] for number in range(len(self)))

    def item(self, index: int) -> Conversation:
        """Return a row. Raises BlmError if the corpus file has changed."""
        place = self.places[index]
        try:
            return parse_row(parse_json_line(self._read(place)), int(place["line"]))
        except RowError as error:
            raise BlmError(
                f"{self.location(index)} has changed since the corpus was validated: {error}; run the same "
                "command again"
            ) from error

    def location(self, index: int) -> str:
        """Return the place of a row as "file:line"."""
        return f"{self.folder / CORPUS_FILE}:{self.places[index]['line']}"

    def _read(self, place: Any) -> bytes:
        if self._file < 0:
            self._file = os.open(self.folder / CORPUS_FILE, os.O_RDONLY)
        return os.pread(self._file, int(place["size"]), int(place["offset"]))
