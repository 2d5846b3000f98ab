"""One thread runs the model. Callers wait in a short line, control before chat.

A call that has begun is not interrupted: an action waits at most for one chat answer.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from typing import TypeVar

from blm.types import BlmError

T = TypeVar("T")


class Priority(IntEnum):
    """Who goes first; a smaller number is served earlier."""

    CONTROL = 0
    CHAT = 1


class BusyError(BlmError):
    """The line is full; try again later."""


class ModelThread:
    """Run calls one after another in one thread, by priority, then by arrival. Belongs to one event loop."""

    def __init__(self, limit: int = 16) -> None:
        """`limit`: how many calls of one priority may wait. A crowd of chats cannot shut out control."""
        self._limit = limit
        self._pool = ThreadPoolExecutor(1, "blm-model")
        self._line: list[tuple[Priority, int, asyncio.Future[None]]] = []
        self._arrival = itertools.count()
        self._now: asyncio.Future[None] | None = None

    async def run(self, call: Callable[[], T], priority: Priority) -> T:
        """Await `call()`. Raises BusyError when the line is full, and whatever `call` raises."""
        if sum(p == priority and not turn.done() for p, _, turn in self._line) >= self._limit:
            raise BusyError(f"{self._limit} {priority.name.lower()} requests are waiting already; try again")
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        heapq.heappush(self._line, (priority, next(self._arrival), turn))
        self._advance()
        try:
            await turn
            return await loop.run_in_executor(self._pool, call)
        finally:
            if self._now is turn:
                self._now = None
                self._advance()

    def close(self) -> None:
        """Wait for the call in progress, then end the thread."""
        self._pool.shutdown()

    def _advance(self) -> None:
        while self._now is None and self._line:
            turn = heapq.heappop(self._line)[2]
            if not turn.done():  # else its caller left
                self._now = turn
                turn.set_result(None)
