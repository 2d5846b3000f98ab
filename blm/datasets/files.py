"""The manifest that vouches for a dataset, `meta/manifest.json`, which is written last.

It holds the format, the caller's provenance (versions, seeds, configuration), and the size and SHA-256 of
every other file of the dataset.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blm.io import RESTORE, DamagedError, read_json, reading, require_no_pointer, sha256_file, write_json
from blm.types import BlmError

MANIFEST = "meta/manifest.json"
PARTS = ("data", "meta", "videos")
"""Sub-folders that belong to a dataset; what lies beside them (a README, a .gitattributes) does not."""


def describe_files(folder: Path) -> dict[str, Any]:
    """Return name -> size and SHA-256 of every file of a dataset but the manifest."""
    return {name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for name, path in _list(folder)}


def write_manifest(folder: Path, version: int, provenance: Mapping[str, Any]) -> None:
    """Describe all files that are in `folder` now."""
    content = {"format": version, "provenance": dict(provenance), "files": describe_files(folder)}
    write_json(folder / MANIFEST, content)


def content_hash(manifest: Mapping[str, Any]) -> str:
    """Hash of the content of all files. Provenance does not enter: equal data are equal."""
    hashes = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


Watch = Callable[[Sequence[Any], str], Iterable[Any]]
"""Goes through things as they are, and may show how far it is under a title."""


def unwatched(things: Sequence[Any], title: str) -> Iterable[Any]:
    return things


def manifest_faults(
    folder: Path, manifest: Mapping[str, Any], quick: bool = False, watch: Watch = unwatched
) -> Iterator[DamagedError]:
    """Compare all files with the manifest, by size and content; `quick` compares videos by size only."""
    present = dict(_list(folder))
    for name, entry in watch([*manifest["files"].items()], "files"):
        path = present.pop(name, None)
        try:
            require_no_pointer(folder / name)
        except DamagedError as error:
            yield error
            continue
        if path is None:
            yield DamagedError(f"'{folder / name}' is missing")
        elif (size := path.stat().st_size) != entry["bytes"]:
            yield DamagedError(
                f"'{path}' has {size} bytes, the manifest says {entry['bytes']}: it was cut or altered"
            )
        elif not (quick and name.startswith("videos/")) and sha256_file(path) != entry["sha256"]:
            yield DamagedError(f"'{path}' has another SHA-256 than the manifest says: it was altered")
    for path in present.values() if not quick else ():
        yield DamagedError(f"'{path}' is not in the manifest: it is not of this dataset", "move it elsewhere")


def written_here(folder: Path, provenance: Mapping[str, Any]) -> set[str]:
    """Return the names of the files of a dataset that may be replaced: this very collection wrote them.

    Raises BlmError, and says what to do, for a dataset of another program or collection, and for one that was
    altered since: nothing of it can be made again.
    """
    remedy = "choose another folder, or move it away"
    if not (folder / MANIFEST).is_file():
        raise BlmError(f"'{folder}' exists, and nothing in it shows that this program wrote it; {remedy}")
    manifest = read_json(folder / MANIFEST)
    with reading(folder / MANIFEST):
        theirs, files = dict(manifest["provenance"]), dict(manifest["files"])
    ours = json.loads(json.dumps(dict(provenance)))
    if theirs.get("collect", theirs) != ours.get("collect", ours):
        raise BlmError(f"'{folder}' holds a dataset of another collection; {remedy}")
    for fault in manifest_faults(folder, manifest):
        if fault.fix == RESTORE:
            raise BlmError(f"{fault.what}, so '{folder}' is not replaced; {remedy}")
    return {*files, MANIFEST}


def verify_files(folder: Path | str, watch: Watch = unwatched) -> list[DamagedError]:
    """Hash every file of a dataset that this program wrote; return an error for each damaged one.

    Raises BlmError when there is no manifest to compare with.
    """
    path = Path(folder) / MANIFEST
    manifest = read_json(path)
    with reading(path):
        return list(manifest_faults(Path(folder), manifest, watch=watch))


def _list(folder: Path) -> Iterator[tuple[str, Path]]:
    """All files of the dataset but the manifest: name relative to the folder, and path."""
    for path in sorted(path for part in PARTS for path in (folder / part).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and not path.name.startswith("."):
            yield name, path
