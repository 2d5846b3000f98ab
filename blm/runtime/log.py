"""The event log of a run: one JSON object per line."""

from __future__ import annotations

import json
import threading
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

RECENT = 1000
"""Number of events kept in memory."""


class RunLog:
    """Writes events. A failed write is counted and not raised. Thread-safe."""

    def __init__(self, path: Path | str | None = None) -> None:
        """With a path, lines are appended to that file. Raises OSError if it cannot be opened."""
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.failed_writes = 0
        self._lock = threading.Lock()
        self._file: TextIO | None = None if path is None else Path(path).open("a", encoding="utf-8")  # noqa: SIM115

    def write(self, event: str, at: float, **details: Any) -> None:
        """Record an event. `at` is on the loop's monotonic clock [s]; the UTC time is added."""
        row = {"event": event, "at": round(at, 4), "utc": datetime.now(UTC).isoformat(), **details}
        with self._lock:
            self.recent.append(row)
            if self._file is None:
                return
            try:
                self._file.write(json.dumps(row, default=str) + "\n")
                self._file.flush()
            except (OSError, ValueError):
                self.failed_writes += 1

    def close(self) -> None:
        """Close the file; later events are kept in memory only."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = None
