"""Connections: how long a client may take, how many there are, and which one goes when there are too many.

uvicorn bounds neither the time of a half-sent request nor the number of websockets. Here one table counts
both kinds. A connection is *busy* while a request of its is answered or its websocket is open; only busy ones
count towards MAX_CONNECTIONS. The others wait for a request, and the table closes them when it needs the
place: those without a key first, of the address that holds most, the longest silent one. So whoever
opens sockets and says nothing, or half of something, keeps nobody out.
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

from blm.serving.access import keys as access
from blm.serving.errors import RequestError

log = logging.getLogger(__name__)
MAX_CONNECTIONS = 1000
"""Requests in progress and open websockets; further ones get status 503."""
RESERVED = 100
"""Of these, places that only clients with a key get, on a server with keys."""
ADDRESS_SHARE = 0.75
"""Part of the places that one address may hold while it shows no key."""
WAITING = 64
"""Connections beyond MAX_CONNECTIONS, on which requests are read: for /health, a key, or a refusal."""
KEEP_ALIVE_S = 100.0
"""An idle connection stays open for this long [s]: longer than in the pools that may reuse it (httpx 5,
aiohttp 15, AWS load balancers 60, nginx 75, Go 90), else a client sends into one that is being closed."""
WRITE_TIMEOUT_S = 30.0
"""A client that takes nothing of what it asked for is dropped after this time [s]."""
BODY_GRACE = 3.0
"""The routes answer a late body with 408; who goes on sending is cut off after this many times that."""
MAX_FRAGMENTS = 1024
"""Frames of one websocket message; empty ones cost memory that a limit on bytes does not see."""
MAX_AHEAD = 4096
"""Messages that a websocket's client may have sent ahead of the one that is being answered."""
MAX_PINGS = 100
"""Pings a second; clients send one every 20 seconds."""
PARSED_AT_ONCE = 16 * 1024
"""Bytes of a websocket; up to 256 kB come in one piece, and 40,000 frames in them would take a second."""


@dataclass(eq=False)
class Connection:
    """One TCP connection. The gate finds it in the ASGI scope at `state["connection"]`."""

    table: ConnectionTable
    transport: asyncio.Transport
    address: str
    trusted: bool = False
    """Whether a valid key came over it."""
    busy: bool = False
    since: float = field(default_factory=time.monotonic)
    """When it was opened, or its last request was answered [s, monotonic]."""


class ConnectionTable:
    """All connections of one server. To be used in its event loop only."""

    def __init__(self) -> None:
        self._open = set[Connection]()
        self._held = Counter[str]()
        self._busy = 0
        self._busy_untrusted = Counter[str]()

    def add(self, transport: asyncio.Transport) -> Connection:
        """Take up a new connection; beyond the limit the least useful waiting one is closed for it."""
        peer = transport.get_extra_info("peername")
        connection = Connection(self, transport, str(peer[0]) if isinstance(peer, tuple) else "")
        self._open.add(connection)
        self._held[connection.address] += 1
        if len(self._open) > MAX_CONNECTIONS + WAITING:
            waiting = (one for one in self._open if not one.busy and one is not connection)
            victim = min(waiting, key=lambda one: (one.trusted, -self._held[one.address], one.since))
            self.remove(victim)
            victim.transport.abort()
        return connection

    def remove(self, connection: Connection) -> None:
        if connection in self._open:
            self._open.remove(connection)
            self.leave(connection)
            _decrement(self._held, connection.address)

    def enter(self, connection: Connection, *, trusted: bool, keys: bool) -> None:
        """A request begins. Raises RequestError 503 when all places are taken; `leave` gives it back.

        `trusted`: it shows a valid key. `keys`: the server has keys at all.
        """
        connection.trusted |= trusted
        if connection.busy:
            return
        limit = MAX_CONNECTIONS - (RESERVED if keys and not connection.trusted else 0)
        mine = self._busy_untrusted[connection.address]
        if self._busy >= limit or (not connection.trusted and mine >= ADDRESS_SHARE * MAX_CONNECTIONS):
            raise RequestError(503, f"{self._busy} connections are in use; try again", code="busy")
        connection.busy = True
        self._busy += 1
        if not connection.trusted:
            self._busy_untrusted[connection.address] += 1

    def leave(self, connection: Connection) -> None:
        """Its request is answered, or its websocket closed."""
        if connection.busy:
            connection.busy, connection.since = False, time.monotonic()
            self._busy -= 1
            if not connection.trusted:
                _decrement(self._busy_untrusted, connection.address)

    def __len__(self) -> int:
        return len(self._open)

    @property
    def busy(self) -> int:
        return self._busy


def _decrement(counts: Counter[str], key: str) -> None:
    counts[key] -= 1
    if counts[key] <= 0:
        del counts[key]


class WriteWatch:
    """Drops a connection whose client takes nothing: its replies would stay in memory for ever."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self._loop = transport, asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._left = 0

    def start(self) -> None:
        self.stop()
        self._left = _unacknowledged(self._transport)
        self._timer = self._loop.call_later(WRITE_TIMEOUT_S, self._check)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        if _unacknowledged(self._transport) < self._left:  # slow, but it reads
            self.start()
        else:
            self._transport.abort()


def _unacknowledged(transport: asyncio.Transport) -> int:
    """Bytes that the client has not taken yet: ours, and where the system tells (SIOCOUTQ) its socket's.

    A socket's own buffer holds megabytes, so ours alone may stand still while a slow client reads.
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
    """uvicorn's protocol, with a time limit for every request on a connection and a place in the table."""

    connection: Connection
    _writes: WriteWatch
    _owed: tuple[str | None, Any] = (None, None)
    """What the client has begun and not finished, and the request before it."""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        table: ConnectionTable = self.config.app.state.connections  # type: ignore[union-attr]
        self.connection, self._writes = table.add(transport), WriteWatch(transport)
        self.app_state = {**self.app_state, "connection": self.connection}
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        self.connection.table.remove(self.connection)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._stop_watching()
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP in the same form as every other error."""
        body = json.dumps(RequestError(400, msg).to_json()).encode()
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
        }
        lines = [
            (name.encode(), value.encode()) for name, value in (headers | access.SECURITY_HEADERS).items()
        ]
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

    def _watch(self) -> None:
        """Start the clock when the client begins to owe something, and stop it when that has come."""
        if self.transport.get_protocol() is not self or self.transport.is_closing():
            self._stop_watching()
            return
        state, owed = self.conn.their_state, None
        if state is h11.SEND_BODY:
            owed = "body"
        elif state is h11.IDLE and (self.cycle is None or self.conn.trailing_data[0]):
            owed = "headers"
        if (owed, self.cycle) == self._owed:
            return
        self._stop_watching()
        self._owed = (owed, self.cycle)
        if owed is not None:
            limit = access.PATIENCE_S * (BODY_GRACE if owed == "body" else 1.0)
            self._timer = self.loop.call_later(limit, self._overdue)

    def _stop_watching(self) -> None:
        self._owed = (None, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._writes.stop()

    def _overdue(self) -> None:
        if self.flow.read_paused:  # the server has not read what came: not the client's fault
            self._timer = self.loop.call_later(access.PATIENCE_S, self._overdue)
        else:
            self.transport.close()


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's protocol, with a time limit for each message from its first byte on; silence is free."""

    _writes: WriteWatch
    _timer: asyncio.TimerHandle | None = None
    _finished = False
    _second, _pings = 0.0, 0
    """The second in which pings are counted, and how many came in it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._writes = WriteWatch(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._writes.stop()
        connection: Connection = self.app_state["connection"]
        connection.table.remove(connection)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._finished = not self.handshake_initiated  # the handshake itself comes in one piece
        for start in range(0, len(data), PARSED_AT_ONCE):
            super().data_received(data[start : start + PARSED_AT_ONCE])
            if self.queue.qsize() > MAX_AHEAD:
                self._fail(1008, f"more than {MAX_AHEAD} messages were sent ahead")
            if self.transport.is_closing():
                break
        partial = bool(self.frames or self.conn.reader.buffer) or not self._finished
        if self._finished or not partial:
            self._stop_timer()
        if partial and self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(access.PATIENCE_S, self._overdue)

    def handle_connect(self, event: Request) -> None:
        send = self.conn.send_response

        def send_secured(response: Response) -> None:
            for name, value in access.SECURITY_HEADERS.items():
                response.headers.setdefault(name, value)
            send(response)

        self.conn.send_response = send_secured  # type: ignore[method-assign]
        super().handle_connect(event)

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True  # refused: else uvicorn logs an error for each refusal

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
        self.transport.pause_reading()  # else answers to pings pile up for one who never reads

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writes.stop()
        if not self.read_paused:
            self.transport.resume_reading()

    def _overdue(self) -> None:
        self._timer = None
        if self.read_paused:  # the server has not read what came: not the client's fault
            self._timer = self.loop.call_later(access.PATIENCE_S, self._overdue)
        else:
            self._fail(1008, f"a message did not arrive within {access.PATIENCE_S:g} s")

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
