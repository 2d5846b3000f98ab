"""The manifest of a dataset, `meta/manifest.json`, which is written last.

It contains the format version, the caller's provenance (versions, seeds, configuration), and the
size and SHA-256 checksum of every other file of the dataset.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from blm.io import RESTORE, DamagedError, read_json, reading, require_no_pointer, sha256_file, write_json
from blm.types import BlmError

MANIFEST = "meta/manifest.json"
PARTS = ("data", "meta", "videos")
"""Sub-folders of a dataset; files next to them (README, .gitattributes) do not belong to it."""


@dataclass(frozen=True)
class FileRecord:
    """The size and checksum of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `meta/manifest.json`."""

    format: int
    provenance: Mapping[str, Any]
    """What the caller stored: versions, seeds, configuration."""
    files: Mapping[str, FileRecord]
    """Name, relative to the dataset -> record of every other file."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of a dataset. Raises DamagedError that names the file."""
        value = read_json(folder / MANIFEST)
        with reading(folder / MANIFEST):
            files = {
                name: FileRecord(entry["bytes"], entry["sha256"]) for name, entry in value["files"].items()
            }
            return cls(format=value["format"], provenance=dict(value["provenance"]), files=files)


def describe_files(folder: Path) -> dict[str, FileRecord]:
    """Return name -> size and SHA-256 of every file of a dataset except the manifest."""
    return {name: FileRecord(path.stat().st_size, sha256_file(path)) for name, path in _list(folder)}


def write_manifest(folder: Path, version: int, provenance: Mapping[str, Any]) -> None:
    """Write the manifest of the files that are in `folder` now."""
    manifest = Manifest(format=version, provenance=dict(provenance), files=describe_files(folder))
    write_json(folder / MANIFEST, asdict(manifest))


def content_hash(files: Mapping[str, FileRecord]) -> str:
    """Return a hash of the content of all files of a dataset."""
    hashes = {name: file.sha256 for name, file in files.items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


ProgressIterator = Callable[[Sequence[Any], str], Iterable[Any]]
"""Iterates over a sequence unchanged; it may show a titled progress bar."""


def no_progress(items: Sequence[Any], title: str) -> Iterable[Any]:
    """Iterate without a progress bar."""
    return items


def manifest_faults(
    folder: Path, manifest: Manifest, quick: bool = False, progress: ProgressIterator = no_progress
) -> Iterator[DamagedError]:
    """Yield files that differ from the manifest in size or checksum.

    `quick` skips checksums of videos.
    """
    present = dict(_list(folder))
    for name, record in progress([*manifest.files.items()], "files"):
        path = present.pop(name, None)
        try:
            require_no_pointer(folder / name)
        except DamagedError as error:
            yield error
            continue
        if path is None:
            yield DamagedError(f"'{folder / name}' is missing")
        elif (size := path.stat().st_size) != record.bytes:
            yield DamagedError(
                f"'{path}' has {size} bytes, the manifest says {record.bytes}: it was cut or altered"
            )
        elif not (quick and name.startswith("videos/")) and sha256_file(path) != record.sha256:
            yield DamagedError(f"'{path}' has another SHA-256 than the manifest says: it was altered")
    for path in present.values() if not quick else ():
        yield DamagedError(
            f"'{path}' is not in the manifest, so it does not belong to this dataset", "move it elsewhere"
        )


def written_here(folder: Path, provenance: Mapping[str, Any]) -> set[str]:
    """Return the files that this very collection wrote and may therefore replace.

    Raises BlmError for a dataset of another program or collection, and for one that was altered,
    because it cannot be reproduced.
    """
    remedy = "choose another folder, or move it away"
    if not (folder / MANIFEST).is_file():
        raise BlmError(f"'{folder}' exists, and nothing in it shows that this program wrote it; {remedy}")
    manifest = Manifest.read(folder)
    theirs = manifest.provenance
    ours = json.loads(json.dumps(dict(provenance)))
    if theirs.get("collect", theirs) != ours.get("collect", ours):
        raise BlmError(f"'{folder}' holds a dataset of another collection; {remedy}")
    for fault in manifest_faults(folder, manifest):
        if fault.fix == RESTORE:
            raise BlmError(f"{fault.what}, so '{folder}' is not replaced; {remedy}")
    return {*manifest.files, MANIFEST}


def verify_files(folder: Path | str, progress: ProgressIterator = no_progress) -> list[DamagedError]:
    """Check every file of a dataset against its manifest; return an error for each damaged file.

    Raises BlmError if there is no manifest.
    """
    folder = Path(folder)
    return list(manifest_faults(folder, Manifest.read(folder), progress=progress))


def _list(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield name (relative to the folder) and path of all files of a dataset except the manifest."""
    for path in sorted(path for part in PARTS for path in (folder / part).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and not path.name.startswith("."):
            yield name, path
