"""Single files: read with errors that name them, written in one step: a kill leaves the old or the new one.

A temporary name holds who writes (`owner`): a later writer removes what a killed one left, and leaves alone
what a living one is writing.
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
from typing import Any

from blm.types import BlmError

RESTORE = "restore the file from a copy, or move the folder away and make it again"
LFS = b"version https://git-lfs.github.com/spec/v1"
"""How a Git LFS pointer begins, a text below 1,024 bytes (github.com/git-lfs/git-lfs, docs/spec.md)."""
PULL = "get the files themselves: `git lfs install`, then `git lfs pull` in that folder"
FOREIGN_AGE = 24 * 3600.0
"""A temporary file that another machine (or this one, before it started anew) wrote counts as abandoned after
so many seconds: whether its writer lives cannot be asked from here."""
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<owner>[0-9a-f]{8}-\d+-\d+)-\d+\.part(\.\w+)?", re.DOTALL)
_NAME_LENGTH = 120
"""Characters of a name that its temporary name repeats; file systems allow 255 bytes in all."""
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
"""Errors that can only be of writing."""
_serial = itertools.count(1)
_used: set[Path] = set()
"""Temporary names that this process is writing to."""


class DamagedError(BlmError):
    """One thing that is wrong with a file or a dataset, and how to mend it. Raised, or listed by a check."""

    def __init__(self, what: str, fix: str = RESTORE) -> None:
        super().__init__(what, fix)  # both, so that it comes whole from a worker process
        self.what, self.fix = what, fix

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}"


class PointerError(DamagedError):
    """A Git LFS pointer stands where a file should be: the repository was cloned without its large files."""

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
                if file.read(len(LFS)) == LFS:
                    raise PointerError(path)


# --- reading ------------------------------------------------------------------------------------------------


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
        require_no_pointer(path)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedError(
            f"'{path}' cannot be read ({reason}): it is missing, truncated or altered"
        ) from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises BlmError naming the file."""
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- writing a file -----------------------------------------------------------------------------------------


@contextmanager
def writing(folder: Path, only: Collection[int] = ()) -> Iterator[None]:
    """Turn the errors of a disk, or `only` these, into a BlmError that names the folder and what to do."""
    try:
        yield
    except OSError as error:
        if only and error.errno not in only:
            raise
        remedy = _REMEDIES.get(error.errno or 0, f"the system says: {error}")
        raise BlmError(
            f"cannot write to '{folder}': {remedy}; "
            "then run the same command again, what was finished is kept"
        ) from error


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path; when all went well, it becomes `path` in one step.

    For writers that want a path, and choose the form by its `suffix` (".png"). A file that was there keeps
    its permissions; a symbolic link stays one, and the file that it names is replaced. After an error, or a
    kill, `path` is what it was. Raises BlmError when the disk refuses.
    """
    target = Path(os.path.realpath(path))
    with writing(path.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        _sweep(target)
    temporary = temporary_name(target, suffix)
    try:
        with writing(path.parent, only=FULL):
            yield temporary
        with writing(path.parent):
            with suppress(FileNotFoundError):
                temporary.chmod(target.stat().st_mode & 0o7777)
            flush(temporary)
            temporary.replace(target)
            flush(target.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        released(temporary)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step. Raises BlmError naming the folder if the disk refuses."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """The same for text, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """The same for a value that JSON can hold."""
    write_text(path, json.dumps(value, indent=2) + "\n")


# --- who writes --------------------------------------------------------------------------------------------


@cache
def _place() -> str:
    """Hash of this machine since its start, and of this container: process numbers mean something within."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _started(pid: int) -> str:
    """When a process started, in ticks; 0 where the system does not say. Raises OSError for none."""
    if not Path("/proc/self/stat").exists():
        os.kill(pid, 0)
        return "0"
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def owner() -> str:
    """Who this process is: its place, number and start."""
    return f"{_place()}-{os.getpid()}-{_started(os.getpid())}"


def is_stale(writer: str, changed: float | None = None, foreign_age: float = FOREIGN_AGE) -> bool:
    """Whether the process that wrote this is gone; one of another machine is judged by the file's age."""
    place, _, process = writer.partition("-")
    pid, _, start = process.partition("-")
    if not (pid.isdigit() and start.isdigit()):
        return True
    if place != _place():
        return changed is None or time.time() - changed > foreign_age
    try:
        return _started(int(pid)) != start
    except PermissionError:
        return False
    except OSError:
        return True


def temporary_name(target: Path, suffix: str = "") -> Path:
    """A hidden name beside `target` that says who writes there; this process's own until `released`."""
    path = target.with_name(f".{target.name[:_NAME_LENGTH]}.{owner()}-{next(_serial)}.part{suffix}")
    _used.add(path)
    return path


def released(path: Path) -> None:
    """What is still at a temporary name is from now on what a writer left, even if this process lives on."""
    _used.discard(path)


def leftovers(target: Path, foreign_age: float = FOREIGN_AGE) -> Iterator[Path]:
    """What killed writers of this file or folder left beside it."""
    try:
        names = [path.name for path in target.parent.iterdir()]
    except OSError:
        return
    for name in names:
        match = _TEMPORARY.fullmatch(name)
        if match and match["name"] == target.name[:_NAME_LENGTH]:
            path = target.with_name(name)
            with suppress(OSError):
                mine = match["owner"] == owner() and path not in _used
                if mine or is_stale(match["owner"], path.lstat().st_mtime, foreign_age):
                    yield path


def _sweep(target: Path) -> None:
    """Remove what killed writers of this file left."""
    for left in leftovers(target):
        if left.is_file() and not left.is_symlink():
            with suppress(OSError):
                left.unlink()


def flush(path: Path) -> None:
    """Ask the disk to keep a file or folder through a power failure; not all can be asked."""
    with suppress(OSError):
        place = os.open(path, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)
