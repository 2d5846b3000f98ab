"""The files of a cache: whether they are those that its manifest describes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blm.io import sha256_file
from blm.types import BlmError

SAMPLE_BLOCKS = 16
"""Blocks of a shard that are hashed when a filled cache is opened."""
SAMPLE_BYTES = 65_536
"""Size of such a block."""


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """A file of a cache, as the manifest describes it."""

    sha256: str
    bytes: int = 0
    """Size of the file."""
    sample_sha256: str = ""
    """Hash of blocks of the file, see `sample_sha256`; empty in caches of older versions."""


def describe_file(path: Path) -> dict[str, Any]:
    """Return the fields of `ShardFile` of a file that was just written, for its manifest."""
    return {
        "sha256": sha256_file(path),
        "bytes": path.stat().st_size,
        "sample_sha256": sample_sha256(path),
    }


def require_unaltered(what: str, folder: Path, shards: Mapping[str, ShardFile]) -> None:
    """Raise BlmError for a shard that is missing or altered, by its size and by samples of it.

    `what` names the cache. The whole file was hashed when it was written. Caches of older versions
    have no samples and are hashed again.
    """
    for name, shard in shards.items():
        path = folder / name
        if not path.exists():
            same = False
        elif shard.sample_sha256:
            same = (path.stat().st_size, sample_sha256(path)) == (shard.bytes, shard.sample_sha256)
        else:
            same = sha256_file(path) == shard.sha256
        if not same:
            raise BlmError(
                f"{what} '{folder}': {name} is missing or altered; move the folder away, run again"
            )


def sample_sha256(path: Path) -> str:
    """Return the sha256 of blocks at the beginning, at the end and evenly between; of a small file,
    all of it is hashed."""
    size = path.stat().st_size
    if size <= SAMPLE_BLOCKS * SAMPLE_BYTES:
        return sha256_file(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in np.linspace(0, size - SAMPLE_BYTES, SAMPLE_BLOCKS).astype(int).tolist():
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
