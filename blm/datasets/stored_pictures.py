"""Pictures that a dataset keeps in its data files, as encoded bytes or as paths of image files."""

from __future__ import annotations

import threading
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from blm.io import DamagedError, reading
from blm.types import ImageArray

OPEN_GROUPS = 4
"""Maximum number of row groups per camera whose encoded pictures stay in memory."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredPictures:
    """The pictures of one camera in the column of data files."""

    folder: Path
    """Folder of the dataset, which paths of images are relative to."""
    files: tuple[Path, ...]
    column: str
    groups: tuple[tuple[int, int, int], ...]
    """First frame of the dataset, file and row group, in the order of frames."""
    shape: tuple[int, int]
    """Height and width [px]."""
    _held: dict[int, list[Any]] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def open(cls, folder: Path, files: tuple[Path, ...], column: str) -> StoredPictures:
        """Find the row groups, and the shape of the first picture. Raises DamagedError."""
        groups, first = list[tuple[int, int, int]](), 0
        for number, path in enumerate(files):
            with reading(path):
                metadata = pq.ParquetFile(path).metadata
                for group in range(metadata.num_row_groups):
                    groups.append((first, number, group))
                    first += metadata.row_group(group).num_rows
        kept: Any = {"folder": folder, "files": files, "column": column, "groups": tuple(groups)}
        height, width = cls(**kept, shape=(0, 0))._decode(0).shape[:2]
        return cls(**kept, shape=(height, width))

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process reads the files again."""
        names = ("folder", "files", "column", "groups", "shape")
        return partial(StoredPictures, **{name: getattr(self, name) for name in names}), ()

    def read(self, frame: int) -> ImageArray:
        """Return frame `frame` of the dataset, uint8 [H, W, 3] RGB. Thread-safe.

        Raises DamagedError for a picture that cannot be read, or of another size than the first.
        """
        picture = self._decode(frame)
        if picture.shape[:2] != self.shape:
            raise DamagedError(
                f"'{self.folder}': frame {frame} of {self.column} is {picture.shape[:2]}, the first is "
                f"{self.shape}",
                "fix it with the program that wrote it",
            )
        return picture

    def _decode(self, frame: int) -> ImageArray:
        place = bisect_right(self.groups, (frame, len(self.files), 0)) - 1
        first, number, group = self.groups[place]
        where = f"'{self.files[number]}': frame {frame} of {self.column}"
        with self._lock:
            rows = self._held.pop(place, None)
            if rows is None:
                with reading(self.files[number]):
                    table = pq.ParquetFile(self.files[number]).read_row_group(group, columns=[self.column])
                    rows = table[self.column].to_pylist()
            self._held[place] = rows
            if len(self._held) > OPEN_GROUPS:
                del self._held[next(iter(self._held))]
        stored = rows[frame - first]
        try:
            with Image.open(self._source(stored)) as opened:
                return np.asarray(opened.convert("RGB"))
        except (OSError, UnidentifiedImageError, TypeError, ValueError) as error:
            raise DamagedError(f"{where} cannot be read ({error})") from error

    def _source(self, stored: Any) -> Any:
        """Return what Pillow opens for {"bytes", "path"}, bytes, or a path."""
        content, path = stored, stored
        if isinstance(stored, dict):
            content, path = stored.get("bytes"), stored.get("path")
        if isinstance(content, bytes):
            return BytesIO(content)
        name = PurePosixPath(str(path))
        if path is None or name.is_absolute() or ".." in name.parts:
            raise ValueError(
                f"it is neither an encoded picture nor a file of the dataset: {str(stored)[:60]}"
            )
        return self.folder / name
