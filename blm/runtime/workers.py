"""Threads at the edge of the loop: each carries out one blocking call at a time, and can be left behind."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Worker:
    """One daemon thread for calls that may never return. The caller never waits longer than it says."""

    def __init__(self, name: str) -> None:
        self.idle = threading.Event()
        """Set while nothing is being carried out."""
        self.idle.set()
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Carry this out after what was submitted before."""
        future: Future[Any] = Future()
        self.idle.clear()
        self._jobs.put((future, call))
        return future

    def close(self, timeout_s: float) -> bool:
        """End the thread when its present call returns; whether it ended within this time."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, call = job
            try:
                future.set_result(call())
            except BaseException as error:  # whatever a driver raises must reach the loop
                future.set_exception(error)
            if self._jobs.empty():
                self.idle.set()
            del job, future, call
