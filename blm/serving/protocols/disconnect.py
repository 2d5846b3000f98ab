"""Cancel work whose client has disconnected."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def cancel_on_disconnect(work: Coroutine[Any, Any, T], receiving: asyncio.Task[Any]) -> T:
    """Return the result of `work`; cancel it if the client disconnects.

    `receiving` waits for the next message and raises when the client disconnects; that exception is
    raised. If the next message arrives first, `work` continues, and the message stays in
    `receiving` for the caller.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, receiving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and (lost := receiving.exception()) is not None:
            raise lost
        return await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)  # wait until it has ended
