"""The server side of ZMTP 3.0, the protocol of ZeroMQ over TCP, for clients with REQ sockets.

libzmq is not used, because it collects all parts of a message, however many, before the program
sees one: 60 MB from a peer without a key took 1.6 GB. It also accepts connections without limit,
and does not report that a peer has disconnected. Here everything is read piece by piece, with
limits on size, parts and time. Sources: https://rfc.zeromq.org/spec/23/ (ZMTP 3.0), /37/ (3.1:
PING), /28/ (envelopes of requests).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from blm.types import BlmError

_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
"""Signature, version 3.0, security mechanism NULL; the API key is in the request."""
_READY = b"\x05READY" + b"\x0bSocket-Type" + (6).to_bytes(4, "big") + b"ROUTER"
_MORE, _LONG, _COMMAND = 1, 2, 4
"""Flags of a frame: another part follows; the size has eight bytes; the frame is a command."""
MAX_PARTS = 8
"""Maximum number of parts of a message: its envelope, an empty part, the body."""
MAX_COMMAND = 512
"""Maximum size of a command [bytes]: READY with an identity of 255 bytes is the longest."""
MAX_COMMANDS = 100
"""Maximum number of commands per second; libzmq sends few heartbeats."""
MAX_ENVELOPE = 256 * MAX_PARTS
SMALL = 2 * 2**20
"""Messages up to this size need no slot [bytes]."""
WRITE_TIMEOUT_S = 20.0
"""Timeout of a reply to a peer that does not read [s]; then it is disconnected."""


class ProtocolError(BlmError):
    """The peer sent data that is not ZMTP, or exceeded a limit."""


@dataclass(frozen=True)
class ZmtpRequest:
    """A message of a REQ socket."""

    envelope: tuple[bytes, ...]
    """Parts to send back before the reply; the last one is empty."""
    body: bytes


class ZmtpConnection:
    """One connection. Every wait has a timeout, except for the start of a message."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._second, self._commands = 0.0, 0

    async def handshake(self) -> None:
        """Exchange greetings.

        Raises ProtocolError, and EOFError when the peer disconnects.
        """
        self._writer.write(_GREETING + _frame(_COMMAND, _READY))
        greeting = await self._reader.readexactly(len(_GREETING))
        if greeting[0] != 0xFF or greeting[9] != 0x7F or greeting[10] < 3:
            raise ProtocolError("the peer does not speak ZMTP 3; use libzmq 4 or later")
        if greeting[12:32].rstrip(b"\0") != b"NULL":
            raise ProtocolError("the peer requests a security mechanism; only NULL is supported")
        flags, size = await self._header(await self._reader.readexactly(1))
        if not flags & _COMMAND or not (await self._reader.readexactly(size)).startswith(b"\x05READY"):
            raise ProtocolError("the peer did not send READY")

    async def receive(self, limit: int, within_s: float, slots: asyncio.Semaphore) -> ZmtpRequest:
        """Return the next request, of at most `limit` bytes.

        It must be complete `within_s` after its first byte. A request above SMALL takes one of
        `slots` while it is read. Raises ProtocolError, TimeoutError, and EOFError when the peer has
        disconnected.
        """
        while True:
            first = await self._reader.readexactly(1)
            async with asyncio.timeout(within_s):
                parts = await self._parts(first, limit, slots)
            if parts:
                break
        if b"" not in parts[:-1] or parts.index(b"") != len(parts) - 2:
            raise ProtocolError("not a request of a REQ socket: an envelope, an empty part, one body")
        return ZmtpRequest(tuple(parts[:-1]), parts[-1])

    async def send(self, request: ZmtpRequest, reply: bytes) -> None:
        """Send a reply.

        Raises TimeoutError if the peer does not read, and OSError if it has disconnected.
        """
        for part in request.envelope:
            self._writer.write(_frame(_MORE, part))
        self._writer.write(_frame(0, reply))
        await self._drain()

    def close(self) -> None:
        """Close the connection and discard replies that the peer has not read."""
        self._writer.close()
        if self._writer.transport.get_write_buffer_size():
            self._writer.transport.abort()

    async def _parts(self, first: bytes, limit: int, slots: asyncio.Semaphore) -> list[bytes]:
        """Return all parts of a message; none for a command."""
        parts, total = list[bytes](), 0
        while True:
            flags, size = await self._header(first)
            total += size
            if flags & _COMMAND:
                await self._handle_command(await self._reader.readexactly(size))
                if not parts:
                    return []
            elif total > limit + MAX_ENVELOPE or len(parts) == MAX_PARTS:
                raise ProtocolError(f"a message has at most {MAX_PARTS} parts and {limit} bytes")
            elif size > SMALL:
                async with slots:
                    parts.append(await self._reader.readexactly(size))
            else:
                parts.append(await self._reader.readexactly(size))
            if not flags & (_MORE | _COMMAND):
                return parts
            first = await self._reader.readexactly(1)

    async def _header(self, first: bytes) -> tuple[int, int]:
        """Return flags and size of the frame that begins with this byte."""
        flags = first[0]
        if flags > 7 or (flags & _COMMAND and flags & _MORE):
            raise ProtocolError(f"no frame of ZMTP begins with byte {flags:#04x}")
        size = int.from_bytes(await self._reader.readexactly(8 if flags & _LONG else 1), "big")
        if flags & _COMMAND and size > MAX_COMMAND:
            raise ProtocolError(f"a command has at most {MAX_COMMAND} bytes, got {size}")
        return flags, size

    async def _handle_command(self, command: bytes) -> None:
        now = time.monotonic()
        if now - self._second > 1:
            self._second, self._commands = now, 0
        self._commands += 1
        if self._commands > MAX_COMMANDS:
            raise ProtocolError(f"more than {MAX_COMMANDS} commands within a second")
        if command.startswith(b"\x04PING"):  # a time to live of two bytes, then the context to return
            self._writer.write(_frame(_COMMAND, b"\x04PONG" + command[7:23]))
            await self._drain()

    async def _drain(self) -> None:
        await asyncio.sleep(0)  # reads and writes may never suspend: without this, a flood blocks the loop
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await self._writer.drain()


def _frame(flags: int, body: bytes) -> bytes:
    if len(body) > 255:
        return bytes([flags | _LONG]) + len(body).to_bytes(8, "big") + body
    return bytes([flags, len(body)]) + body
