"""Watchdog: threads that monitor the control loop and the e-stop, and depend on neither."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from blm.runtime.states import StopReason

EStop = Callable[[], bool]
"""Returns True when the e-stop is pressed."""
"""Returns True when the e-stop is pressed."""


class Watchdog:
    """Polls the e-stop and detects a stalled loop.

    The loop calls `beat` and reads `stop` in every step. A stalled loop sends no commands, so the
    arm holds its last one. The event `stalled` keeps the loop from sending more when it resumes,
    and `on_stall` is called.
    """

    def __init__(
        self,
        *,
        period_s: float,
        stall_s: float,
        estop: EStop | None = None,
        on_stall: Callable[[], None] = lambda: None,
    ) -> None:
        self._period_s, self._stall_s, self._estop, self._on_stall = period_s, stall_s, estop, on_stall
        self._beat = self._polled = time.monotonic()
        self._stop: StopReason | None = None
        self.stalled = threading.Event()
        self._closing = threading.Event()
        self._poller = threading.Thread(target=self._poll, name="blm-estop", daemon=True)
        self._guard = threading.Thread(target=self._watch, name="blm-watchdog", daemon=True)
        self._guard.start()
        if estop is not None:
            self._poller.start()

    def beat(self) -> None:
        """Signal that the loop is alive."""
        self._beat = time.monotonic()

    @property
    def stop(self) -> StopReason | None:
        """The reason why the arm must stop; None if there is none."""
        if self._stop is not None:
            return self._stop
        if self._estop is not None and (silent := time.monotonic() - self._polled) > self._stall_s:
            return "estop", f"the e-stop hook has not returned for {silent:.2f} s"
        return None

    def close(self, timeout_s: float) -> bool:
        """End the threads. Returns whether they ended within `timeout_s`."""
        self._closing.set()
        threads = [thread for thread in (self._guard, self._poller) if thread.ident is not None]
        for thread in threads:
            thread.join(timeout_s)
        return not any(thread.is_alive() for thread in threads)

    def _poll(self) -> None:
        assert self._estop is not None
        while not self._closing.is_set() and self._stop is None:
            try:
                if self._estop():
                    self._stop = "estop", "the e-stop was pressed"
            except Exception as error:
                self._stop = "estop", f"the e-stop hook failed: {error!r}"
            self._polled = time.monotonic()
            self._closing.wait(self._period_s)
        while not self._closing.is_set():
            self._polled = time.monotonic()
            self._closing.wait(self._period_s)

    def _watch(self) -> None:
        while not self._closing.wait(self._period_s):
            silent = time.monotonic() - self._beat
            if silent > self._stall_s and not self.stalled.is_set():
                self._stop = self._stop or ("stalled", f"the loop did not run for {silent:.2f} s")
                self.stalled.set()
                with suppress(Exception):
                    self._on_stall()
