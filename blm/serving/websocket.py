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
MAX_AHEAD = 4096
"""Messages that a peer may have sent ahead of the one that is being answered."""
MAX_PINGS = 100
"""Pings a second; clients send one every 20 seconds."""
_SLICE = 16 * 1024
"""Bytes that are parsed at once: 256 kB, which may come in one piece, hold 40,000 empty frames."""


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """Closes connections that flood: with empty fragments, with pings, with unanswered messages."""

    _window, _pings = 0.0, 0
    """The second that is being counted, and the pings in it."""

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), _SLICE):
            super().data_received(data[start : start + _SLICE])
            if self.transport.is_closing():
                return
            if self.queue.qsize() > MAX_AHEAD:
                self._end(1008, f"at most {MAX_AHEAD} messages may be sent ahead")
                return

    def handle_cont(self, event: Frame) -> None:
        if self.close_sent:
            return
        if len(self.frames) >= MAX_FRAGMENTS:
            self._end(1009, f"a message has at most {MAX_FRAGMENTS} fragments")
            return
        super().handle_cont(event)

    def handle_ping(self) -> None:
        super().handle_ping()
        now = self.loop.time()
        if now - self._window > 1:
            self._window, self._pings = now, 0
        self._pings += 1
        if self._pings > MAX_PINGS or self.transport.get_write_buffer_size() > MAX_UNSENT:
            self.transport.abort()

    def _end(self, code: int, reason: str) -> None:
        self.conn.fail(code, reason)
        self.handle_parser_exception()
