"""What happens to work whose client has gone: it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def while_connected(work: Coroutine[Any, Any, T], receiving: asyncio.Task[Any]) -> T:
    """Return what `work` gives; cancel it when `receiving`, the wait for the next message, raises.

    Raises what `receiving` raised then. A next message that has come is left for the caller.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, receiving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and (gone := receiving.exception()) is not None:
            raise gone
        return await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)  # so that nothing of it runs on
