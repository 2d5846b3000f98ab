"""Files on disk: atomic JSON, errors that say what to do, and the manifest that vouches for a dataset.

The manifest, `meta/manifest.json`, is written last. It holds the format, the caller's provenance (versions,
seeds, configuration), and the size and SHA-256 of every other file of the dataset.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blm.types import BlmError

MANIFEST = "meta/manifest.json"
PARTS = ("data", "meta", "videos")
"""Sub-folders that belong to a dataset; what lies beside them (a README, a .gitattributes) does not."""
RESTORE = "restore the file from a copy, or delete the dataset folder and collect again"
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission is denied: make it writable, or choose another folder",
    errno.EPERM: "permission is denied: make it writable, or choose another folder",
    errno.ENOTDIR: "a file is where a folder should be: choose another folder",
    errno.EEXIST: "a file is where a folder should be: choose another folder",
}


class DamagedError(BlmError):
    """One thing that is wrong with a file or a dataset, and how to mend it. Raised, or listed by a check."""

    def __init__(self, what: str, fix: str = RESTORE) -> None:
        super().__init__(what, fix)  # both, so that it comes whole from a worker process
        self.what, self.fix = what, fix

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the errors of a disk into a BlmError that names the folder and says what to do."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, f"the system says: {error}")
        raise BlmError(
            f"cannot write to '{folder}': {remedy}; "
            "then run the same command again, what was finished is kept"
        ) from error


@contextmanager
def reading(path: Path) -> Iterator[Path]:
    """Turn whatever goes wrong in reading and parsing `path` into a BlmError that names it."""
    try:
        yield path
    except BlmError:
        raise
    except KeyError as error:
        raise DamagedError(f"'{path}' lacks {error}: it is of another program, or was altered") from error
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
    ) as error:  # of files, JSON, parquet and NumPy
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedError(
            f"'{path}' cannot be read ({reason}): it is missing, truncated or altered"
        ) from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises BlmError naming the file."""
    with reading(path):
        return json.loads(path.read_text())


def write_json(path: Path, value: Any) -> None:
    """Write atomically. Raises BlmError naming the folder if the disk refuses."""
    temporary = path.with_name(f".{path.name}.part")
    with writing(path.parent):
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        temporary.replace(path)


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_files(folder: Path) -> dict[str, Any]:
    """Return name -> size and SHA-256 of every file of a dataset but the manifest."""
    return {name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for name, path in _list(folder)}


def write_manifest(folder: Path, version: int, provenance: Mapping[str, Any]) -> None:
    """Describe all files that are in `folder` now."""
    content = {"format": version, "provenance": dict(provenance), "files": describe_files(folder)}
    write_json(folder / MANIFEST, content)


def content_hash(manifest: Mapping[str, Any]) -> str:
    """Hash of the content of all files. Provenance does not enter: equal data are equal."""
    hashes = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def manifest_faults(folder: Path, manifest: Mapping[str, Any], quick: bool = False) -> Iterator[DamagedError]:
    """Compare all files with the manifest, by size and content; `quick` compares videos by size only."""
    present = dict(_list(folder))
    for name, entry in manifest["files"].items():
        path = present.pop(name, None)
        if path is None:
            yield DamagedError(f"'{folder / name}' is missing")
        elif (size := path.stat().st_size) != entry["bytes"]:
            yield DamagedError(
                f"'{path}' has {size} bytes, the manifest says {entry['bytes']}: it was cut or altered"
            )
        elif not (quick and name.startswith("videos/")) and sha256_of(path) != entry["sha256"]:
            yield DamagedError(f"'{path}' has another SHA-256 than the manifest says: it was altered")
    for path in present.values() if not quick else ():
        yield DamagedError(f"'{path}' is not in the manifest: it is not of this dataset", "move it elsewhere")


def verify_files(folder: Path | str) -> list[DamagedError]:
    """Hash every file of a dataset that this program wrote; return an error for each damaged one.

    Raises BlmError when there is no manifest to compare with.
    """
    path = Path(folder) / MANIFEST
    manifest = read_json(path)
    with reading(path):
        return list(manifest_faults(Path(folder), manifest))


def _list(folder: Path) -> Iterator[tuple[str, Path]]:
    """All files of the dataset but the manifest: name relative to the folder, and path."""
    for path in sorted(path for part in PARTS for path in (folder / part).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and not path.name.startswith("."):
            yield name, path
