"""Folders: built next to their place, moved in atomically, removed only if ours.

Every folder that is being built or is about to be removed holds a marker file (`MARK`). Nothing
here removes a folder without it. Symbolic links are never followed when something is removed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from blm.io.files import (
    FULL,
    abandoned_paths,
    fsync,
    is_stale,
    release_temporary_name,
    temporary_name,
    writer_id,
    writing,
)
from blm.types import BlmError

MARK = ".blm-owner.json"
"""Marker file of a folder that this program created and may remove."""
MANY_FILES = 64
"""Number of files from which one `sync` flushes everything: an `fsync` takes about 4 ms."""
RETURN_AGE = 60.0
"""Age after which a folder that another machine moved aside and did not replace is restored [s]."""
Written = Callable[[Path], Collection[str]]
"""Returns the names (relative, with slashes) of the files in a folder that this program wrote and
that were not altered since. Raises BlmError if it cannot prove that the folder is this program's."""


@contextmanager
def new_folder(target: Path, *, written: Written | None = None, resume: bool = False) -> Iterator[Path]:
    """Yield an empty folder next to `target`, which becomes `target` atomically if no error occurs.

    An existing `target` is replaced only if `written` is given and proves that it is this
    program's. Other files in it are copied into the new folder, as NAME.kept if there is a file of
    that name. With `resume`, the folder that a killed (or interrupted) call left is yielded again
    with its content.

    After a kill, either the old or the new folder is at `target`; if the kill came between two
    renames, `recover_folder` restores the old one. Raises BlmError if anything else is at `target`,
    and on disk errors.
    """
    place = Path(os.path.realpath(recover_folder(target)))
    if written is None and os.path.lexists(place):
        raise BlmError(f"'{target}' exists; move it away, or name another one")
    replace = os.path.lexists(place)
    foreign = _foreign_files(place, written) if written is not None else []
    with writing(target):
        place.parent.mkdir(parents=True, exist_ok=True)
        work = _open_work_folder(place, resume)
    keep = False
    try:
        with writing(target, only=FULL):
            yield work
        with writing(target):
            for name in foreign:
                _copy_foreign_file(place / name, work / name)
            _fsync_tree(work)
            _swap(work, place, replace)
    except KeyboardInterrupt:
        keep = resume
        raise
    finally:
        release_temporary_name(work)
        if not keep and os.path.lexists(work):
            remove_own(work)


def recover_folder(target: Path) -> Path:
    """Repair what a killed writer of `target` left and return `target`.

    Call it before opening a folder.

    If the writer was killed between two renames, the old folder is restored.
    """
    place = Path(os.path.realpath(target))
    if not os.path.lexists(place):
        for left in abandoned_paths(place, RETURN_AGE):
            if _read_mark(left).get("state") == "old" and _read_mark(left).get("target") == place.name:
                with writing(target):
                    left.rename(place)
                break
    mark = place / MARK
    if mark.is_file() and is_stale(_read_mark(place).get("owner", "")) and "kind" not in _read_mark(place):
        with suppress(OSError):  # on a read-only disk it remains, which is harmless
            mark.unlink()
    return target


def work_folder(path: Path, kind: str, facts: Mapping[str, Any]) -> Path:
    """Create or reopen a folder for unfinished work, which survives a killed run; return it.

    `facts` identify the work, e.g. its configuration. Raises BlmError for a folder with other
    facts, and for a folder that this program did not create.
    """
    key = hashlib.sha256(json.dumps([kind, facts], sort_keys=True, default=str).encode()).hexdigest()[:16]
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        if not any(path.iterdir()):
            _write_mark(path, {"kind": kind, "facts": key})
    mark = _read_mark(path)
    if mark.get("kind") != kind:
        raise BlmError(
            f"'{path}' is needed for unfinished work, but this program did not create it; move it away"
        )
    if mark.get("facts") != key:
        raise BlmError(f"'{path}' holds unfinished work of other settings; run with those, or move it away")
    return path


def remove_own(folder: Path, ours: Callable[[PurePath], bool] = lambda name: True) -> bool:
    """Remove a folder that this program marked as its own; return whether it is gone.

    Files for which `ours` (called with the name relative to the folder) is false stay, with the
    folders that hold them. Links are removed, but not their targets. Raises BlmError for a folder
    without our mark.
    """
    if folder.is_symlink() or not (folder / MARK).is_file():
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()  # the writer was killed before it marked the folder, or after it removed the mark
            return True
        raise BlmError(f"'{folder}' is not removed: nothing in it shows that this program created it")
    with writing(folder):
        for path, folders, files in os.walk(folder, topdown=False):
            for name in (*files, *folders):
                entry = Path(path, name)
                if entry.is_dir() and not entry.is_symlink():
                    with suppress(OSError):  # it keeps the files that are not ours
                        entry.rmdir()
                elif entry != folder / MARK and ours(entry.relative_to(folder)):
                    entry.unlink()
        if len(list(folder.iterdir())) > 1:
            return False
        (folder / MARK).unlink()  # last, so that a killed removal leaves a marked folder
        folder.rmdir()
    return True


def _open_work_folder(target: Path, resume: bool) -> Path:
    """Return the folder to build in: a new one, or the one of a killed call.

    Remove other abandoned ones.
    """
    work = temporary_name(target)
    for left in [path for path in abandoned_paths(target) if path.is_dir()]:
        if resume and not work.exists() and _read_mark(left).get("state") == "part":
            left.rename(work)
        else:
            with suppress(BlmError):  # a folder without our mark must not be removed
                remove_own(left)
    work.mkdir(exist_ok=True)
    _write_mark(work, {"state": "part", "target": target.name})
    return work


def _write_mark(folder: Path, facts: Mapping[str, Any]) -> None:
    content = json.dumps({"program": "blm", "owner": writer_id(), **facts}).encode()
    file = os.open(folder / MARK, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
    try:
        os.write(file, content)
    finally:
        os.close(file)


def _read_mark(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's mark; empty if there is none, or if it is incomplete."""
    with suppress(OSError, ValueError):
        mark = json.loads((folder / MARK).read_text())
        return mark if isinstance(mark, dict) else {}
    return {}


def _swap(work: Path, target: Path, replace: bool) -> None:
    """Move a marked folder to `target`.

    Without `replace`, fail if something appeared there meanwhile.
    """
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
        fsync(target.parent)
        _write_mark(old, {"state": "old", "target": target.name})
        remove_own(old)
        release_temporary_name(old)
    (target / MARK).unlink()
    fsync(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders atomically (Linux: renameat2); return False if the system cannot."""
    call: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    return bool(call(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)


def _foreign_files(folder: Path, written: Written) -> list[str]:
    """Return the files that this program did not write in a folder that is about to be replaced."""
    if not os.path.lexists(folder):
        return []
    if not folder.is_dir():
        raise BlmError(
            f"cannot write to '{folder}': a file is where a folder should be: choose another folder"
        )
    names = {*written(folder), MARK}
    return [name for name in files_below(folder) if name not in names]


def files_below(folder: Path) -> list[str]:
    """Return the sorted names of all files and links below a folder, relative to it, with slashes.

    Links are not followed.
    """
    found = []
    for path, folders, files in os.walk(folder):
        links = [name for name in folders if Path(path, name).is_symlink()]
        found += [Path(path, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def _copy_foreign_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    while os.path.lexists(target):
        target = target.with_name(f"{target.name}.kept")
    shutil.copy2(source, target, follow_symlinks=False)


def _fsync_tree(folder: Path) -> None:
    names = files_below(folder)
    if len(names) > MANY_FILES:
        os.sync()
        return
    for name in names:
        if not (folder / name).is_symlink():
            fsync(folder / name)
