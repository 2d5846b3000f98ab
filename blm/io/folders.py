"""Folders: built beside their place and swapped in, and removed only where a mark proves that they are ours.

Every folder that is being built or on its way out holds a mark (`MARK`), without which nothing here removes a
folder. Symbolic links are never followed when something is removed.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from blm.io.files import FULL, flush, is_stale, leftovers, owner, released, temporary_name, writing
from blm.types import BlmError

MARK = ".blm-owner.json"
"""File that says that this program made the folder it lies in, and may remove it."""
MANY_FILES = 64
"""The system flushes everything at once for folders with more files than this: one call a file takes 4 ms."""

RETURN_AGE = 60.0
"""The same for a folder that another machine moved aside, and did not replace: it comes back."""

Written = Callable[[Path], Collection[str]]
"""Names (relative, with slashes) of the files of a folder that this program wrote and nobody altered. Raises
BlmError when it cannot prove that the folder is its own."""


@contextmanager
def new_folder(target: Path, *, written: Written | None = None, resume: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`; when all went well, it becomes `target` in one step.

    What stands at `target` is replaced only if `written` is given and proves it to be this program's; other
    files in there move into the new folder, as NAME.kept where it has one of that name. With `resume` the
    folder that a killed (or interrupted) call left is handed out again, with what is in it. A kill leaves the
    old or the new folder; between two renames, `settled` brings the old one back. Raises BlmError for
    anything else at `target`, and when the disk refuses.
    """
    place = Path(os.path.realpath(settled(target)))
    if written is None and os.path.lexists(place):
        raise BlmError(f"'{target}' exists; move it away, or name another one")
    replace = os.path.lexists(place)
    strangers = _strangers(place, written) if written is not None else []
    with writing(target):
        place.parent.mkdir(parents=True, exist_ok=True)
        work = _begun(place, resume)
    keep = False
    try:
        with writing(target, only=FULL):
            yield work
        with writing(target):
            for name in strangers:
                _carry(place / name, work / name)
            _flush_tree(work)
            _swap(work, place, replace)
    except KeyboardInterrupt:
        keep = resume
        raise
    finally:
        released(work)
        if not keep and os.path.lexists(work):
            remove_own(work)


def settled(target: Path) -> Path:
    """Return `target` after mending what a killed writer of that folder left: call it before opening one.

    If the kill came between two renames, the folder that stood there comes back.
    """
    place = Path(os.path.realpath(target))
    if not os.path.lexists(place):
        for left in leftovers(place, RETURN_AGE):
            if _mark_of(left).get("state") == "old" and _mark_of(left).get("target") == place.name:
                with writing(target):
                    left.rename(place)
                break
    mark = place / MARK
    if mark.is_file() and is_stale(_mark_of(place).get("owner", "")) and "kind" not in _mark_of(place):
        with suppress(OSError):  # on a read-only disk it stays, and says nothing to a reader
            mark.unlink()
    return target


def work_folder(path: Path, kind: str, facts: Mapping[str, Any]) -> Path:
    """Make a folder for unfinished work that outlives a killed run, or open it again; return it.

    `facts` say what it is made from. Raises BlmError for a folder of other facts, and for one that this
    program did not make.
    """
    key = hashlib.sha256(json.dumps([kind, facts], sort_keys=True, default=str).encode()).hexdigest()[:16]
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        if not any(path.iterdir()):
            _write_mark(path, {"kind": kind, "facts": key})
    mark = _mark_of(path)
    if mark.get("kind") != kind:
        raise BlmError(
            f"'{path}' is needed for unfinished work, but this program did not make it; move it away"
        )
    if mark.get("facts") != key:
        raise BlmError(f"'{path}' holds unfinished work of other settings; run with those, or move it away")
    return path


def remove_own(folder: Path, ours: Callable[[PurePath], bool] = lambda name: True) -> bool:
    """Remove a folder that this program marked as its own, and return whether it is gone.

    Files that `ours` (given names relative to the folder) denies stay, and with them their folders. Links are
    removed, not what they point to. Raises BlmError for a folder without our mark.
    """
    if folder.is_symlink() or not (folder / MARK).is_file():
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()  # killed before it was marked, or after
            return True
        raise BlmError(f"'{folder}' is not removed: this program cannot prove that it made it")
    with writing(folder):
        for path, folders, files in os.walk(folder, topdown=False):
            for name in (*files, *folders):
                entry = Path(path, name)
                if entry.is_dir() and not entry.is_symlink():
                    with suppress(OSError):  # it keeps what is not ours
                        entry.rmdir()
                elif entry != folder / MARK and ours(entry.relative_to(folder)):
                    entry.unlink()
        if len(list(folder.iterdir())) > 1:
            return False
        (folder / MARK).unlink()  # last: a kill leaves a folder that is still known as ours
        folder.rmdir()
    return True


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process. Raises BlmError when another one, or another call, holds it.

    The lock is on the folder itself: it leaves no file, and ends with the process.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlmError(
                f"another process is using '{folder}'; wait for its end, or use another folder"
            ) from error
        except OSError:
            pass  # some network file systems have no locks
        yield
    finally:
        os.close(place)


# --- inside ------------------------------------------------------------------------------------------------


def _begun(target: Path, resume: bool) -> Path:
    """The folder to build in: a new one, or the one that a killed call left. Others that were left go."""
    work, lefts = temporary_name(target), [path for path in leftovers(target) if path.is_dir()]
    for left in lefts:
        if resume and not work.exists() and _mark_of(left).get("state") == "part":
            left.rename(work)
        else:
            with suppress(BlmError):  # without our mark it is not ours to remove
                remove_own(left)
    work.mkdir(exist_ok=True)
    _write_mark(work, {"state": "part", "target": target.name})
    return work


def _write_mark(folder: Path, facts: Mapping[str, Any]) -> None:
    content = json.dumps({"program": "blm", "owner": owner(), **facts}).encode()
    file = os.open(folder / MARK, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
    try:
        os.write(file, content)
    finally:
        os.close(file)


def _mark_of(folder: Path) -> dict[str, Any]:
    """The mark of a folder; empty for none, or one that a kill cut."""
    with suppress(OSError, ValueError):
        mark = json.loads((folder / MARK).read_text())
        return mark if isinstance(mark, dict) else {}
    return {}


def _swap(work: Path, target: Path, replace: bool) -> None:
    """Put a marked folder in the place of another one, or none; it then fails if one appeared meanwhile."""
    if not replace or not os.path.lexists(target):
        work.rename(target)
    else:
        _write_mark(target, {"state": "old", "target": target.name})
        old = work
        if not _exchange(work, target):
            old = temporary_name(target)
            try:
                target.rename(old)
            except OSError:
                (target / MARK).unlink()
                raise
            work.rename(target)
        flush(target.parent)
        _write_mark(old, {"state": "old", "target": target.name})
        remove_own(old)
        released(old)
    (target / MARK).unlink()
    flush(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step where the system can (Linux, renameat2); False where it cannot."""
    call: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    return bool(call(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)


def _strangers(folder: Path, written: Written) -> list[str]:
    """Files in a folder to be replaced that this program did not write."""
    if not os.path.lexists(folder):
        return []
    if not folder.is_dir():
        raise BlmError(
            f"cannot write to '{folder}': a file is where a folder should be: choose another folder"
        )
    names = {*written(folder), MARK}
    return [name for name in files_below(folder) if name not in names]


def files_below(folder: Path) -> list[str]:
    """Names of all files and links below a folder, relative to it, with slashes. Links are not followed."""
    found = []
    for path, folders, files in os.walk(folder):
        links = [name for name in folders if Path(path, name).is_symlink()]
        found += [Path(path, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def _carry(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    while os.path.lexists(target):
        target = target.with_name(f"{target.name}.kept")
    shutil.copy2(source, target, follow_symlinks=False)


def _flush_tree(folder: Path) -> None:
    names = files_below(folder)
    if len(names) > MANY_FILES:
        os.sync()
        return
    for name in names:
        if not (folder / name).is_symlink():
            flush(folder / name)
