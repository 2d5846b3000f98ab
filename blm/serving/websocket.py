"""uvicorn's websocket, with bounds on what a peer can pile up without ever ending a message."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

if TYPE_CHECKING:
    from websockets.frames import Frame

MAX_FRAGMENTS = 1024
"""Fragments of one message. Empty ones add nothing to its size, which alone would bound them."""
MAX_UNSENT = 2**20
"""Bytes of replies, pongs among them, that wait for a peer that reads too slowly."""


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """Closes connections of endless empty fragments, and of pings whose pongs are never read."""

    def handle_cont(self, event: Frame) -> None:
        if self.close_sent:
            return
        if len(self.frames) >= MAX_FRAGMENTS:
            self.conn.fail(1009, f"a message has at most {MAX_FRAGMENTS} fragments")
            self.handle_parser_exception()
            return
        super().handle_cont(event)

    def handle_ping(self) -> None:
        super().handle_ping()
        if self.transport.get_write_buffer_size() > MAX_UNSENT:
            self.transport.abort()
