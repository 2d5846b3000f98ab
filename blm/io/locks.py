"""Advisory file locks (flock): they keep a second process out of a folder or a file.

A lock leaves no file behind and ends with the process that holds it. Some network file systems have
no locks; there, nothing is locked.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blm.io.files import writing
from blm.types import BlmError


def lock_exclusively(descriptor: int, taken: str) -> None:
    """Lock an open file or folder until it is closed.

    Raises BlmError(`taken`) if it is locked already.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlmError(taken) from error
    except OSError:
        pass  # some network file systems have no locks


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Create a run folder if it is missing, and lock it for this process.

    Raises BlmError if another process, or another call in this one, holds the lock.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock_exclusively(
            descriptor, f"another process is using '{folder}'; wait for it to end, or use another folder"
        )
        yield
    finally:
        os.close(descriptor)
