"""The journal of a run: one line per finished work unit, from which a killed run resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blm.io import lock_exclusively
from blm.jobs.unit import FailedUnit, Result
from blm.types import BlmError

_BEGIN = b'{"key": '
"""First bytes of every line."""


def read_journal(journal: Path, *, repair: bool = True) -> dict[str, Result]:
    """Return key -> result of the finished units in a journal.

    A last line that a kill truncated is removed from the file; without `repair`, it is left out,
    because another process may be writing it. Units that were given up do not
    count as finished, so they run again. Raises BlmError for a line of another program; the file
    then stays unchanged.
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
            f"journal '{journal}' is damaged ({error}); move it away to run all of its units again"
        ) from error
    if repair and whole != len(data):
        os.truncate(journal, whole)  # in place, because that also works on a full disk
    return finished


@contextmanager
def open_journal(journal: Path) -> Iterator[Callable[[str, Result | FailedUnit], None]]:
    """Lock the journal for this process; yield a function that appends one unit's line atomically.

    Raises BlmError if another process uses the journal, or if it cannot be written.
    """
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        log = journal.open("ab", buffering=0)
    except OSError as error:
        raise BlmError(
            f"cannot write the journal '{journal}': {error.strerror}; choose a writable folder"
        ) from error

    def append(key: str, result: Result | FailedUnit) -> None:
        row = {"failure": result.reason} if isinstance(result, FailedUnit) else {"result": result}
        line = (json.dumps({"key": key, **row}) + "\n").encode()
        size = os.fstat(log.fileno()).st_size
        try:
            while line:  # a nearly full disk may accept a part of the line
                line = line[log.write(line) :]
        except OSError as error:
            with suppress(OSError):
                log.truncate(size)
            raise BlmError(
                f"cannot write to the journal '{journal}': {error.strerror}; finished units are "
                "kept: free some space and run the same command again"
            ) from error

    with log:
        lock_exclusively(
            log.fileno(),
            f"another run is using the journal '{journal}'; wait for it to end, or use another folder",
        )
        yield append
