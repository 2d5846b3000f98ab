"""Threads at the edge of the loop: each carries out one blocking call at a time, and can be left behind."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any


class Worker:
    """One daemon thread for calls that may never return. The caller never waits longer than it says."""

    def __init__(self, name: str) -> None:
        self._last: Future[Any] | None = None
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Carry this out after what was submitted before."""
        future: Future[Any] = Future()
        self._last = future
        self._jobs.put((future, call))
        return future

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until everything submitted is carried out; False if that takes longer than this."""
        return self._last is None or not wait([self._last], timeout_s).not_done

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
            del job, future, call
