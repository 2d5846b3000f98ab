"""Check all media of a corpus in parallel, each once, and store the sizes of their pictures.

With the sizes, conversations can be tokenised without opening a file again: how many tokens a
picture becomes depends on its size alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from blm.corpora.format.faults import RowError
from blm.corpora.format.find_media import read_references
from blm.corpora.format.scan import key_of
from blm.io import read_json, write_array, write_json
from blm.jobs import Result, WorkUnit, run_units
from blm.media import locate, split_time
from blm.types import BlmError

FILES_PER_UNIT = 128
"""Number of media files that are decoded as one work unit."""
_SIZE = np.dtype([("key", "<u8"), ("height", "<i4"), ("width", "<i4")])


class MediaIndex:
    """Sizes and faults of the media of a corpus, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self._sizes: np.ndarray = np.load(folder / "media.npy", mmap_mode="r")
        self._keys = np.ascontiguousarray(self._sizes["key"])  # a search in a field would copy it each time
        self._faults: dict[str, tuple[str, str]] = read_json(folder / "media-faults.json")

    def size(self, reference: str) -> tuple[int, int]:
        """Return height and width of a picture [px]. Raises RowError for its fault."""
        if reference in self._faults:
            raise RowError(*self._faults[reference])
        key = key_of(reference)
        place = int(np.searchsorted(self._keys, np.uint64(key)))
        if place == len(self._keys) or int(self._keys[place]) != key:
            raise BlmError(f"'{reference}' is not among the media of the corpus that were checked")
        return int(self._sizes["height"][place]), int(self._sizes["width"][place])


def media_signature(root: Path, references: Sequence[str]) -> str:
    """Return a hash of the names, sizes and times of change of media files.

    A missing file counts as empty.
    """
    digest = hashlib.sha256()
    for name, _ in groupby(references, lambda reference: split_time(reference)[0]):
        try:
            found = locate(name, root).stat()
            digest.update(f"{name} {found.st_size} {found.st_mtime_ns}\n".encode())
        except (OSError, BlmError, ValueError):
            digest.update(f"{name} 0\n".encode())
    return digest.hexdigest()


def check_media(root: Path, references: Sequence[str], folder: Path, *, workers: int) -> MediaIndex:
    """Decode all media in worker processes, with 0 in this one; write what was found to `folder`.

    `references` are sorted, so those of one file are neighbours. `folder` is named after the content
    of the files, so finished checks in it are kept.
    """
    if not (folder / "media-faults.json").exists():
        units = [
            WorkUnit(f"{number}", (root, part, folder / f"media-{number:06d}.npy"))
            for number, part in enumerate(_parts(references))
        ]
        journal = folder / "journal-media.jsonl"
        workers = workers if len(units) > 1 else 0  # a process takes longer to start
        results = run_units(
            check_part, units, journal=journal, workers=workers, title=f"media of {root.name}"
        )
        files = [unit.payload[2] for unit in units]
        sizes = np.concatenate([np.zeros(0, dtype=_SIZE), *map(np.load, files)])
        write_array(folder / "media.npy", sizes[np.argsort(sizes["key"])])
        faults = {name: fault for result in results.values() for name, fault in result["faults"].items()}
        write_json(folder / "media-faults.json", faults)
        for file in files:
            file.unlink(missing_ok=True)
    return MediaIndex(folder)


def check_part(payload: tuple[Path, Sequence[str], Path]) -> Result:
    """Decode some media; write their sizes, and return their faults."""
    root, references, out = payload
    sizes, faults = [], dict[str, tuple[str, str]]()
    for file, group in groupby(references, lambda reference: split_time(reference)[0]):
        for reference, found in read_references(file, list(group), root).items():
            if isinstance(found, RowError):
                faults[reference] = (found.reason, found.detail)
            else:
                sizes.append((key_of(reference), *found.shape[:2]))
    write_array(out, np.array(sizes, dtype=_SIZE))
    return {"faults": faults}


def _parts(references: Sequence[str]) -> Iterator[list[str]]:
    """Yield the references of `FILES_PER_UNIT` files each."""
    part, count = list[str](), 0
    for _, group in groupby(references, lambda reference: split_time(reference)[0]):
        part += group
        count += 1
        if count == FILES_PER_UNIT:
            yield part
            part, count = [], 0
    if part:
        yield part
