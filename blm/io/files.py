"""Single files: read with errors that name the file, and written atomically.

A killed writer leaves the old or the new file, never a part. The name of a temporary file
identifies its writer (`writer_id`), so a later writer can remove the files of a killed one
without touching those of a running one.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import platform
import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blm.types import BlmError

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESTORE = "restore the file from a copy, or move the folder away and make it again"
LFS_HEADER = b"version https://git-lfs.github.com/spec/v1"
"""First bytes of a Git LFS pointer, which has less than 1,024 bytes (git-lfs, docs/spec.md)."""
PULL = "get the files themselves: `git lfs install`, then `git lfs pull` in that folder"
FOREIGN_AGE = 24 * 3600.0
"""Age after which a temporary file of another machine or boot counts as abandoned [s].

This process cannot find out whether its writer is alive.
"""
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<owner>[0-9a-f]{8}-\d+-\d+)-\d+\.part(\.\w+)?", re.DOTALL)
_NAME_LENGTH = 120
"""Number of characters of a file name that its temporary name repeats.

File systems allow 255 bytes.
"""
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission is denied: make it writable, or choose another folder",
    errno.EPERM: "permission is denied: make it writable, or choose another folder",
    errno.ENOTDIR: "a file is where a folder should be: choose another folder",
    errno.EEXIST: "a file is where a folder should be: choose another folder",
    errno.ENOTEMPTY: "another process put a folder there meanwhile: choose another folder",
    errno.EISDIR: "a folder is where a file should be: choose another name",
    errno.ENAMETOOLONG: "the name is too long: choose another one",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Error numbers that only occur in writing."""
_serial = itertools.count(1)
_in_use: set[Path] = set()
"""Temporary paths to which this process is writing."""


class DamagedError(BlmError):
    """A fault of a file or a dataset, and how to fix it. Raised, or listed by a check."""

    def __init__(self, what: str, fix: str = RESTORE) -> None:
        super().__init__(what, fix)  # both, so that it can be unpickled from a worker process
        self.what, self.fix = what, fix

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}"


class PointerError(DamagedError):
    """A file is a Git LFS pointer: the repository was cloned without its large files."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"'{path}' is a Git LFS pointer, not the file itself", PULL)
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)


def require_no_pointer(path: Path) -> None:
    """Raise PointerError if a file is a Git LFS pointer."""
    with suppress(OSError):
        if path.is_file() and path.stat().st_size < 1024:
            with path.open("rb") as file:
                if file.read(len(LFS_HEADER)) == LFS_HEADER:
                    raise PointerError(path)


# --- reading ------------------------------------------------------------------------------------------------


@contextmanager
def reading(path: Path) -> Iterator[Path]:
    """Convert errors in reading and parsing `path` into a DamagedError that names it."""
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
        require_no_pointer(path)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedError(
            f"'{path}' cannot be read ({reason}): it is missing, truncated or altered"
        ) from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises DamagedError that names the file."""
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def read_json_lines(path: Path) -> list[Any]:
    """Return the values of a JSON Lines file; blank lines are skipped.

    Raises DamagedError that names the file.
    """
    with reading(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- writing a file -----------------------------------------------------------------------------------------


@contextmanager
def writing(folder: Path, only: Collection[int] = ()) -> Iterator[None]:
    """Convert disk errors into a BlmError that names the folder and a remedy.

    With `only`, errors with other numbers pass unchanged.
    """
    try:
        yield
    except OSError as error:
        if only and error.errno not in only:
            raise
        remedy = _REMEDIES.get(error.errno or 0, f"the system says: {error}")
        raise BlmError(
            f"cannot write to '{folder}': {remedy}; then run the same command again; finished work is kept"
        ) from error


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path, which replaces `path` atomically if no error occurs.

    For writers that take a path; some choose the format by its `suffix` (".png"). The permissions
    of an existing file are kept. If `path` is a symbolic link, its target is replaced. After an
    error or a kill `path` is unchanged. Raises BlmError on disk errors.
    """
    target = Path(os.path.realpath(path))
    with writing(path.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        _remove_abandoned(target)
    temporary = temporary_name(target, suffix)
    try:
        with writing(path.parent, only=FULL):
            yield temporary
        with writing(path.parent):
            with suppress(FileNotFoundError):
                temporary.chmod(target.stat().st_mode & 0o7777)
            fsync(temporary)
            temporary.replace(target)
            fsync(target.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        release_temporary_name(temporary)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically. Raises BlmError that names the folder on disk errors."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8. Raises BlmError on disk errors."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically. Raises BlmError on disk errors."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_array(path: Path, values: NDArray[Any]) -> None:
    """Write a .npy file atomically. Raises BlmError on disk errors."""
    import numpy as np

    with replacing(path) as temporary, temporary.open("wb") as target:
        np.save(target, values, allow_pickle=False)


# --- identity of the writer --------------------------------------------------------------------------------


@cache
def _machine_id() -> str:
    """Return a hash of this machine, its boot and its container: the scope of a process number."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _start_ticks(pid: int) -> str:
    """Return the start time of a process [clock ticks]; "0" if the system does not tell.

    Raises OSError if there is no such process.
    """
    if not Path("/proc/self/stat").exists():
        os.kill(pid, 0)
        return "0"
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def writer_id() -> str:
    """Return the identity of this process: machine, process number and start time."""
    return f"{_machine_id()}-{os.getpid()}-{_start_ticks(os.getpid())}"


def is_stale(writer: str, changed: float | None = None, foreign_age: float = FOREIGN_AGE) -> bool:
    """Return whether the process `writer` has ended.

    For a process of another machine, the time at which the file was `changed` decides.
    """
    place, _, process = writer.partition("-")
    pid, _, start = process.partition("-")
    if not (pid.isdigit() and start.isdigit()):
        return True
    if place != _machine_id():
        return changed is None or time.time() - changed > foreign_age
    try:
        return _start_ticks(int(pid)) != start
    except PermissionError:
        return False
    except OSError:
        return True


def temporary_name(target: Path, suffix: str = "") -> Path:
    """Return a hidden name next to `target` that identifies this process as the writer.

    The name is in use until `release_temporary_name` is called.
    """
    path = target.with_name(f".{target.name[:_NAME_LENGTH]}.{writer_id()}-{next(_serial)}.part{suffix}")
    _in_use.add(path)
    return path


def release_temporary_name(path: Path) -> None:
    """End the use of a temporary name: a file that is still there is abandoned from now on."""
    _in_use.discard(path)


def abandoned_paths(target: Path, foreign_age: float = FOREIGN_AGE) -> Iterator[Path]:
    """Yield the temporary files and folders that killed writers of `target` left next to it."""
    try:
        names = [path.name for path in target.parent.iterdir()]
    except OSError:
        return
    for name in names:
        match = _TEMPORARY.fullmatch(name)
        if match and match["name"] == target.name[:_NAME_LENGTH]:
            path = target.with_name(name)
            with suppress(OSError):
                mine = match["owner"] == writer_id() and path not in _in_use
                if mine or is_stale(match["owner"], path.lstat().st_mtime, foreign_age):
                    yield path


def _remove_abandoned(target: Path) -> None:
    """Remove the files that killed writers of this file left."""
    for left in abandoned_paths(target):
        if left.is_file() and not left.is_symlink():
            with suppress(OSError):
                left.unlink()


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk, where that is supported."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
