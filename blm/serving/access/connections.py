"""Limits on connections: timeouts, their number, and which idle one to close first.

uvicorn limits neither the time of a half-sent request nor the number of websockets. Here one table
counts both. A connection is *busy* while a request on it is being answered or while its websocket
is open; only busy connections count towards MAX_CONNECTIONS. When there are too many, the table
closes idle connections: first those that have not sent a valid key, then those of the address that
has the most, then the one that has been idle the longest. A client that opens sockets and sends
nothing, or half a request, therefore cannot lock others out.
"""

from __future__ import annotations

import asyncio
import json
import logging
import struct
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame
from websockets.http11 import Request, Response

from blm.serving.access.keys import SECURITY_HEADERS
from blm.serving.errors import RequestError

log = logging.getLogger(__name__)
MAX_CONNECTIONS = 1000
"""Maximum number of busy connections; further requests receive status 503."""
RESERVED_FOR_KEYS = 100
"""Number of these that are reserved for clients with a key, on a server with keys."""
ADDRESS_SHARE = 0.75
"""Share of MAX_CONNECTIONS that one address may use without a key."""
IDLE_SLOTS = 64
"""Number of connections beyond MAX_CONNECTIONS on which a request can be read.

It may be for /health, carry a key, or be refused.
"""
REQUEST_TIMEOUT_S = 20.0
"""Timeout of the headers of a request, of its body, and of one websocket message [s]."""
KEEP_ALIVE_S = 100.0
"""Keep-alive timeout of an idle connection [s].

It is longer than in the connection pools of clients (httpx 5, aiohttp 15, AWS load balancers 60,
nginx 75, Go 90); otherwise a client may send on a connection that is being closed.
"""
WRITE_TIMEOUT_S = 30.0
"""Time after which a client that reads nothing of its reply is disconnected [s]."""
BODY_TIMEOUT_FACTOR = 3.0
"""Multiple of REQUEST_TIMEOUT_S after which a client that keeps sending is disconnected.

The routes answer a late body with status 408 after REQUEST_TIMEOUT_S.
"""
MAX_FRAGMENTS = 1024
"""Maximum number of frames per websocket message: empty frames also take memory."""
MAX_QUEUED_MESSAGES = 4096
"""Maximum number of websocket messages that wait for an answer."""
MAX_PINGS = 100
"""Maximum number of pings per second; clients send one every 20 seconds."""
PARSED_AT_ONCE = 16 * 1024
"""Number of bytes of a websocket that are parsed at a time.

Reads of up to 256 kB may hold 40,000 frames, which would block the event loop for a second.
"""


@dataclass(eq=False)
class TrackedConnection:
    """One TCP connection. The middleware finds it in the ASGI scope at `state["connection"]`."""

    table: ConnectionTable
    transport: asyncio.Transport
    address: str
    authenticated: bool = False
    """Whether it has sent a valid key."""
    busy: bool = False
    idle_since: float = field(default_factory=time.monotonic)
    """When it was opened, or its last request was answered [s, monotonic]."""


class ConnectionTable:
    """All connections of one server. Use it in the server's event loop only."""

    def __init__(self) -> None:
        self._open = set[TrackedConnection]()
        self._per_address = Counter[str]()
        self._busy = 0
        self._busy_anonymous = Counter[str]()

    def add(self, transport: asyncio.Transport) -> TrackedConnection:
        """Register a new connection; beyond the limit, close an idle one for it."""
        peer = transport.get_extra_info("peername")
        connection = TrackedConnection(self, transport, str(peer[0]) if isinstance(peer, tuple) else "")
        self._open.add(connection)
        self._per_address[connection.address] += 1
        if len(self._open) > MAX_CONNECTIONS + IDLE_SLOTS:
            idle = (one for one in self._open if not one.busy and one is not connection)
            victim = min(
                idle, key=lambda one: (one.authenticated, -self._per_address[one.address], one.idle_since)
            )
            self.remove(victim)
            victim.transport.abort()
        return connection

    def remove(self, connection: TrackedConnection) -> None:
        if connection in self._open:
            self._open.remove(connection)
            self.leave(connection)
            _decrement(self._per_address, connection.address)

    def enter(self, connection: TrackedConnection, *, authenticated: bool, keys: bool) -> None:
        """Mark a connection as busy until `leave`. Raises RequestError 503 at the limit.

        `authenticated` says whether the request carries a valid key, `keys` whether the server has
        keys.
        """
        connection.authenticated |= authenticated
        if connection.busy:
            return
        limit = MAX_CONNECTIONS - (RESERVED_FOR_KEYS if keys and not connection.authenticated else 0)
        mine = self._busy_anonymous[connection.address]
        if self._busy >= limit or (not connection.authenticated and mine >= ADDRESS_SHARE * MAX_CONNECTIONS):
            raise RequestError(503, f"{self._busy} connections are in use; try again", code="busy")
        connection.busy = True
        self._busy += 1
        if not connection.authenticated:
            self._busy_anonymous[connection.address] += 1

    def leave(self, connection: TrackedConnection) -> None:
        """Mark a connection as idle: its request is answered, or its websocket is closed."""
        if connection.busy:
            connection.busy, connection.idle_since = False, time.monotonic()
            self._busy -= 1
            if not connection.authenticated:
                _decrement(self._busy_anonymous, connection.address)

    def __len__(self) -> int:
        return len(self._open)

    @property
    def busy(self) -> int:
        return self._busy


def _decrement(counts: Counter[str], key: str) -> None:
    counts[key] -= 1
    if counts[key] <= 0:
        del counts[key]


class WriteTimeout:
    """Aborts a connection whose client stops reading, so that replies do not pile up in memory."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self._loop = transport, asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._unread = 0

    def start(self) -> None:
        self.stop()
        self._unread = _unacknowledged(self._transport)
        self._timer = self._loop.call_later(WRITE_TIMEOUT_S, self._check)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        if _unacknowledged(self._transport) < self._unread:  # slow, but it reads
            self.start()
        else:
            self._transport.abort()


def _unacknowledged(transport: asyncio.Transport) -> int:
    """Return the number of bytes that the client has not acknowledged.

    They are in our write buffer and, where the system reports it (SIOCOUTQ), in the socket's send
    buffer. The socket's buffer holds megabytes, so ours alone may not shrink while a slow client
    reads.
    """
    size = transport.get_write_buffer_size()
    opened = transport.get_extra_info("socket")
    try:
        import fcntl
        import termios

        (queued,) = struct.unpack("i", fcntl.ioctl(opened.fileno(), termios.TIOCOUTQ, bytes(4)))
    except (ImportError, OSError, AttributeError):
        return size
    return size + queued


class HttpProtocol(H11Protocol):
    """uvicorn's protocol with a timeout for every request, in the connection table."""

    connection: TrackedConnection
    _writes: WriteTimeout
    _awaited: tuple[str | None, Any] = (None, None)
    """The part of a request that is arriving ("headers" or "body"), and the request before it."""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        table: ConnectionTable = self.config.app.state.connections  # type: ignore[union-attr]
        self.connection, self._writes = table.add(transport), WriteTimeout(transport)
        self.app_state = {**self.app_state, "connection": self.connection}
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        self.connection.table.remove(self.connection)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_timer()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._stop_timers()
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg: str) -> None:
        """Reply to malformed HTTP with an error in the same form as every other error."""
        body = json.dumps(RequestError(400, msg).to_json()).encode()
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
        }
        lines = [(name.encode(), value.encode()) for name, value in (headers | SECURITY_HEADERS).items()]
        response = h11.Response(status_code=400, headers=lines, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writes.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writes.stop()

    def _update_timer(self) -> None:
        """Run a timer while headers or a body are arriving."""
        if self.transport.get_protocol() is not self or self.transport.is_closing():
            self._stop_timers()
            return
        state, awaited = self.conn.their_state, None
        if state is h11.SEND_BODY:
            awaited = "body"
        elif state is h11.IDLE and (self.cycle is None or self.conn.trailing_data[0]):
            awaited = "headers"
        if (awaited, self.cycle) == self._awaited:
            return
        self._stop_timers()
        self._awaited = (awaited, self.cycle)
        if awaited is not None:
            timeout = REQUEST_TIMEOUT_S * (BODY_TIMEOUT_FACTOR if awaited == "body" else 1.0)
            self._timer = self.loop.call_later(timeout, self._on_timeout)

    def _stop_timers(self) -> None:
        self._awaited = (None, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._writes.stop()

    def _on_timeout(self) -> None:
        if self.flow.read_paused:  # the server has not read the received data: not the client's fault
            self._timer = self.loop.call_later(REQUEST_TIMEOUT_S, self._on_timeout)
        else:
            self.transport.close()


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's protocol with a timeout for each message; an idle socket stays open.

    The timeout begins with the first byte of a message.
    """

    _writes: WriteTimeout
    _timer: asyncio.TimerHandle | None = None
    _finished = False
    _second, _pings = 0.0, 0
    """Start of the second in which pings are counted, and their number."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._writes = WriteTimeout(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._writes.stop()
        connection: TrackedConnection = self.app_state["connection"]
        connection.table.remove(connection)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._finished = not self.handshake_initiated  # the handshake itself arrives in one piece
        for start in range(0, len(data), PARSED_AT_ONCE):
            super().data_received(data[start : start + PARSED_AT_ONCE])
            if self.queue.qsize() > MAX_QUEUED_MESSAGES:
                self._fail(1008, f"more than {MAX_QUEUED_MESSAGES} messages are waiting")
            if self.transport.is_closing():
                break
        partial = bool(self.frames or self.conn.reader.buffer) or not self._finished
        if self._finished or not partial:
            self._stop_timer()
        if partial and self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(REQUEST_TIMEOUT_S, self._on_timeout)

    def handle_connect(self, event: Request) -> None:
        send = self.conn.send_response

        def send_secured(response: Response) -> None:
            for name, value in SECURITY_HEADERS.items():
                response.headers.setdefault(name, value)
            send(response)

        self.conn.send_response = send_secured  # type: ignore[method-assign]
        super().handle_connect(event)

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True  # otherwise uvicorn logs an error for each refused handshake

    def send_receive_event_to_app(self) -> None:
        self._finished = True
        super().send_receive_event_to_app()

    def handle_ping(self) -> None:
        self._finished = True
        super().handle_ping()
        if (now := self.loop.time()) - self._second > 1:
            self._second, self._pings = now, 0
        self._pings += 1
        if self._pings > MAX_PINGS:
            self._fail(1008, f"more than {MAX_PINGS} pings within a second")

    def handle_pong(self, event: Frame) -> None:
        self._finished = True
        super().handle_pong(event)

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) >= MAX_FRAGMENTS:
            self._fail(1009, f"a message has more than {MAX_FRAGMENTS} fragments")
        else:
            super().handle_cont(event)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writes.start()
        self.transport.pause_reading()  # otherwise pongs accumulate for a client that never reads

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writes.stop()
        if not self.read_paused:
            self.transport.resume_reading()

    def _on_timeout(self) -> None:
        self._timer = None
        if self.read_paused:  # the server has not read the received data: not the client's fault
            self._timer = self.loop.call_later(REQUEST_TIMEOUT_S, self._on_timeout)
        else:
            self._fail(1008, f"a message did not arrive within {REQUEST_TIMEOUT_S:g} s")

    def _fail(self, code: int, reason: str) -> None:
        if self.close_sent or self.transport.is_closing():
            return
        self.frames = []
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.conn.fail(code, reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
