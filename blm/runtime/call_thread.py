"""Threads for blocking calls of robot drivers, which the loop can abandon."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any


class CallThread:
    """A daemon thread that runs calls in order. Every wait of its caller has a timeout."""

    def __init__(self, name: str) -> None:
        self._last: Future[Any] | None = None
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Run a call after those submitted before."""
        future: Future[Any] = Future()
        self._last = future
        self._jobs.put((future, call))
        return future

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until all submitted calls are done. Returns False after `timeout_s`."""
        return self._last is None or not wait([self._last], timeout_s).not_done

    def close(self, timeout_s: float) -> bool:
        """End the thread after its current call. Returns whether it ended within `timeout_s`."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, call = job
            try:
                future.set_result(call())
            except BaseException as error:  # any exception of a driver must reach the loop
                future.set_exception(error)
            del job, future, call
