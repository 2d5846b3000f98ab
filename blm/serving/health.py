"""Health of the model: whether its threads make progress, and health checks of the policy and of
chat."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from blm.serving.requests import SchedulerLimits
from blm.serving.runners import ActionRunner, ChatRunner


@dataclass(frozen=True)
class Health:
    """Whether the model works. "ok" while the model thread makes progress, and the last request or
    health check succeeded."""

    status: Literal["warming up", "ok", "failed", "closing"]
    reason: str = ""


class HealthMonitor:
    """Watches the model thread and the tokenizer thread, and checks runners that failed.

    The model thread reports its progress here and runs the checks; any thread may read `health`.
    """

    def __init__(self, runners: Sequence[ActionRunner | ChatRunner], limits: SchedulerLimits) -> None:
        self.ready = threading.Event()
        """Set after the first health check."""
        self.idle = False
        """The model thread waits for work."""
        self._runners, self._limits = runners, limits
        self._progress_at = time.monotonic()
        self._next_check = 0.0

    def note_progress(self) -> None:
        """Record that the model thread has finished a step, or was given work."""
        self._progress_at = time.monotonic()

    def first_check(self) -> None:
        """Check all runners before the first request."""
        for runner in self._runners:
            runner.check()
        self.note_progress()
        self.ready.set()

    def next_check(self) -> float:
        """When a runner is to be checked again [s, monotonic]; infinite if none failed."""
        return self._next_check if self._failing() else float("inf")

    def check_due(self) -> bool:
        return time.monotonic() >= self.next_check()

    def repeat_checks(self) -> None:
        """Check the runners that failed, so that `health` reports the present state."""
        for runner in self._failing():
            runner.check()
        self._next_check = time.monotonic() + self._limits.check_s

    def health(self, tokenizing_since: float) -> Health:
        """Return whether the model can answer now. `tokenizing_since` is when the tokenizer thread
        received its oldest request [s, monotonic]; infinite without a request."""
        if not self.ready.is_set():
            return Health("warming up")
        now = time.monotonic()
        model_since = float("inf") if self.idle else self._progress_at
        for name, since in (("model", model_since), ("tokenizer", tokenizing_since)):
            if now - since > self._limits.stall_s:
                return Health("failed", f"the {name} thread has made no progress for {now - since:.0f} s")
        for runner in self._runners:
            if runner.error is not None:
                return Health("failed", repr(runner.error))
        return Health("ok")

    def _failing(self) -> list[ActionRunner | ChatRunner]:
        return [runner for runner in self._runners if runner.needs_check or runner.error is not None]
