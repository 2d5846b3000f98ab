"""The journal of a run: one line for each finished unit, which a killed run continues from."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blm.jobs.unit import Lost, Result
from blm.types import BlmError

_BEGIN = b'{"key": '
"""How every line begins."""


def read_journal(journal: Path) -> dict[str, Result]:
    """Return the finished units of a journal; a last line cut short by a kill is removed from the file.

    Units that were given up are not finished: they run again. Raises BlmError for a line that is not one of
    ours, and leaves the file as it is.
    """
    if not journal.exists():
        return {}
    data = journal.read_bytes()
    whole = data.rfind(b"\n") + 1
    try:
        rows = [json.loads(line) for line in data[:whole].splitlines()]
        finished = {row["key"]: row["result"] for row in rows if "failure" not in row}
        if not (data[whole:].startswith(_BEGIN) or _BEGIN.startswith(data[whole:])):
            raise ValueError("its last line is of another program")
    except (ValueError, KeyError, TypeError) as error:
        raise BlmError(
            f"journal '{journal}' is damaged ({error}); move it away, and all of its units run again"
        ) from error
    if whole != len(data):
        os.truncate(journal, whole)  # in place: it must also work on a full disk
    return finished


@contextmanager
def appending(journal: Path) -> Iterator[Callable[[str, Result | Lost], None]]:
    """Hold the journal for this process; yield a function that appends one line in full or not at all."""
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        log = journal.open("ab", buffering=0)
    except OSError as error:
        raise BlmError(
            f"cannot write the journal '{journal}': {error.strerror}; choose a folder that you may write to"
        ) from error

    def append(key: str, result: Result | Lost) -> None:
        row = {"failure": result.reason} if isinstance(result, Lost) else {"result": result}
        line = (json.dumps({"key": key, **row}) + "\n").encode()
        size = os.fstat(log.fileno()).st_size
        try:
            while line:  # a disk that is nearly full takes a part
                line = line[log.write(line) :]
        except OSError as error:
            with suppress(OSError):
                log.truncate(size)
            raise BlmError(
                f"cannot write to the journal '{journal}': {error.strerror}; what is finished is kept "
                "in it: make room, and the same command continues there"
            ) from error

    with log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlmError(
                f"another run is using the journal '{journal}'; wait for its end, or use another folder"
            ) from error
        except OSError:
            pass  # some network file systems have no locks
        yield append
