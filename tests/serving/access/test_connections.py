"""Connections: half requests, silent sockets and greedy clients take nothing from others."""

from __future__ import annotations

import base64
import json
import socket
import struct
import time
from contextlib import ExitStack, closing, suppress

import httpx
import pytest
from websockets.sync.client import connect

from blm.serving.access import connections
from blm.serving.access.keys import AccessControl
from blm.serving.app import _raise_file_limit, create_app, server_config
from blm.serving.client import RemotePolicy
from blm.types import BlmError
from tests.support.serving import EchoGenerator, EchoPolicy, body, connected, observation, running, wait_for

KEY = "open-sesame"
BEARER = {"Authorization": f"Bearer {KEY}"}
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HALVES = {
    "silent": b"",
    "half a line": b"GET /hea",
    "half headers": b"GET /health HTTP/1.1\r\nHost: local",
    "half a body": POST + b"Content-Length: 1000\r\n\r\n{",
    "half a chunk": POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    "second half line": GET + b"GET /hea",
    "second half headers": GET + GET + GET + b"GET /health HTTP/1.1\r\nHost",
    "second half body": GET + POST + b"Content-Length: 1000\r\n\r\n{",
    "answered and silent": GET,
}


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_TIMEOUT_S", 0.4)
    monkeypatch.setattr(connections, "KEEP_ALIVE_S", 1.0)


def ended_after(opened: socket.socket, start: float, most: float = 8.0) -> float:
    """Read until the server closes; return how long after `start` that was."""
    opened.settimeout(most)
    with suppress(ConnectionResetError):
        while opened.recv(65536):
            pass
    return time.monotonic() - start


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("sent", HALVES.values(), ids=HALVES)
def test_half_sent_requests_time_out(sent: bytes, key: str | None, hasty: None) -> None:
    with running(EchoPolicy(), EchoGenerator(), api_key=key) as address, connected(address) as opened:
        start = time.monotonic()
        opened.sendall(sent)
        assert 0.3 < ended_after(opened, start) < 4


@pytest.mark.parametrize("start_with", [b"", GET])
def test_a_slow_sender_does_not_reset_the_timeout(start_with: bytes, hasty: None) -> None:
    with running(None, EchoGenerator()) as address, connected(address) as opened:
        opened.sendall(start_with + b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
        start = time.monotonic()
        with pytest.raises(OSError):
            for _ in range(100):
                opened.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - start < 3


def test_whole_requests_one_after_the_other_are_not_timed(hasty: None) -> None:
    with running(None, EchoGenerator()) as address, connected(address) as opened:
        for _ in range(12):  # three times as long as one request may take
            opened.sendall(GET)
            data = b""
            while not data.endswith(b"OK\n"):
                data += opened.recv(65536)
            time.sleep(0.1)
        opened.sendall(GET * 5)  # pipelined
        data = b""
        while data.count(b"OK\n") < 5:
            data += opened.recv(65536)


def test_idle_connections_outlive_the_pools_of_clients() -> None:
    config = server_config(create_app(None, EchoGenerator()))
    assert config.timeout_keep_alive > 90, "Go's pool, the most patient of the common ones, waits 90 s"
    config.app.state.scheduler.close()


@pytest.mark.parametrize("key", [None, KEY])
def test_idle_sockets_do_not_lock_out_clients(key: str | None) -> None:
    """With the real limits: more connections than the server holds, of every kind, all from one address."""
    _raise_file_limit(8192)
    sent = list(HALVES.values())
    with running(EchoPolicy(), EchoGenerator(), api_key=key) as address, ExitStack() as stack:
        headers = BEARER if key else {}
        wait_for(lambda: httpx.get(f"http://{address}/health").status_code == 200)
        client = stack.enter_context(httpx.Client(headers=headers, timeout=15))
        robot = stack.enter_context(RemotePolicy(f"ws://{address}", api_key=key))
        client.get(f"http://{address}/version")
        for number in range(1200):
            opened = stack.enter_context(connected(address))
            with suppress(OSError):
                opened.sendall(sent[number % len(sent)])
        start = time.monotonic()
        assert httpx.get(f"http://{address}/health", timeout=15).status_code == 200
        assert client.get(f"http://{address}/version").status_code == 200
        fresh = httpx.post(
            f"http://{address}/v1/chat/completions", json=body("hi"), headers=headers, timeout=15
        )
        assert fresh.status_code == 200
        assert robot.act(observation()).actions.shape == (4, 8)
        with RemotePolicy(f"ws://{address}", api_key=key) as another:
            assert another.act(observation()).actions.shape == (4, 8)
        assert time.monotonic() - start < 20


def test_open_websockets_count_and_health_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 12)
    monkeypatch.setattr(connections, "IDLE_SLOTS", 4)
    with running(EchoPolicy(), EchoGenerator()) as address, ExitStack() as stack:
        for _ in range(9):  # three quarters: the share of one address
            stack.enter_context(connect(f"ws://{address}", compression=None))
        with pytest.raises(BlmError, match=r"503.*connections are in use"):
            RemotePolicy(f"ws://{address}")
        refused = httpx.get(f"http://{address}/v1/models")
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        for _ in range(30):
            stack.enter_context(connected(address)).sendall(b"GET /hea")
        for path in ("/health", "/healthz", "/ping"):
            assert httpx.get(f"http://{address}{path}").status_code == 200
        stack.close()
        wait_for(lambda: httpx.get(f"http://{address}/v1/models").status_code == 200)


def test_clients_with_a_key_may_use_all_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 12)
    monkeypatch.setattr(connections, "RESERVED_FOR_KEYS", 6)
    monkeypatch.setattr(connections, "IDLE_SLOTS", 4)
    with running(EchoPolicy(), EchoGenerator(), api_key=KEY) as address, ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(RemotePolicy(f"ws://{address}", api_key=KEY))
        assert httpx.get(f"http://{address}/v1/models", headers=BEARER).status_code == 503
        assert httpx.get(f"http://{address}/v1/models").status_code == 401
        assert httpx.get(f"http://{address}/health").status_code == 200


def test_a_login_that_never_ends_takes_no_place_of_key_holders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 8)
    monkeypatch.setattr(connections, "RESERVED_FOR_KEYS", 4)
    login = POST.replace(b"/v1/chat/completions", b"/playground/login") + b"Content-Length: 100\r\n\r\n{"
    with running(EchoPolicy(), EchoGenerator(), api_key=KEY) as address, ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(connected(address)).sendall(login)
        time.sleep(0.2)
        for _ in range(4):
            stack.enter_context(RemotePolicy(f"ws://{address}", api_key=KEY))


class FakeTransport:
    def __init__(self, host: str) -> None:
        self.host, self.aborted = host, False

    def get_extra_info(self, name: str) -> tuple[str, int]:
        return (self.host, 1)

    def abort(self) -> None:
        self.aborted = True


def test_idle_connections_are_closed_by_address_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 6)
    monkeypatch.setattr(connections, "IDLE_SLOTS", 2)
    table = connections.ConnectionTable()

    def open_from(host: str) -> connections.TrackedConnection:
        return table.add(FakeTransport(host))  # type: ignore[arg-type]

    holder, quiet = open_from("key"), open_from("quiet")
    table.enter(holder, authenticated=True, keys=True)
    table.leave(holder)
    greedy = [open_from("greedy") for _ in range(20)]
    assert len(table) == 8
    assert not holder.transport.aborted and not quiet.transport.aborted
    assert [one.transport.aborted for one in greedy] == [True] * 14 + [False] * 6
    for one in greedy[14:]:
        with suppress(BlmError):
            table.enter(one, authenticated=False, keys=False)
    assert table.busy == 5, "one address gets three quarters of six, rounded up"
    table.enter(holder, authenticated=True, keys=True)
    assert table.busy == 6
    for one in (holder, quiet, *greedy):
        table.remove(one)
        table.remove(one)
    assert len(table) == table.busy == 0 and not table._per_address and not table._busy_anonymous


# --- websockets ---


def upgraded(address: str) -> socket.socket:
    opened = connected(address)
    key = base64.b64encode(bytes(16)).decode()
    lines = ["Host: localhost", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
    opened.sendall("\r\n".join(["GET / HTTP/1.1", *lines, f"Sec-WebSocket-Key: {key}", "", ""]).encode())
    assert b" 101 " in opened.recv(65536)
    return opened


def frame(opcode: int, payload: bytes, *, last: bool = True) -> bytes:
    head = bytes([opcode | (0x80 if last else 0)])
    size = (
        bytes([0x80 | len(payload)])
        if len(payload) < 126
        else bytes([0xFE]) + struct.pack("!H", len(payload))
    )
    return head + size + bytes(4) + payload


PING = frame(9, b"p")
PARTS = {
    "half a header": frame(2, b"abc")[:1],
    "header only": frame(2, b"abc")[:6],
    "half a payload": frame(2, b"a" * 50)[:20],
    "after a whole ping": PING + frame(2, b"abc")[:4],
    "first fragment": frame(2, b"abc", last=False),
    "fragment and ping": frame(2, b"abc", last=False) + PING,
    "huge announced": bytes([0x82, 0xFF]) + struct.pack("!Q", 2**20) + bytes(4) + b"x" * 100,
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_half_a_message_times_out(part: bytes, hasty: None) -> None:
    with running(EchoPolicy(), None) as address, closing(upgraded(address)) as opened:
        start = time.monotonic()
        opened.sendall(part)
        assert 0.3 < ended_after(opened, start) < 4


def test_a_slow_message_times_out(hasty: None) -> None:
    with running(EchoPolicy(), None) as address, closing(upgraded(address)) as opened:
        start = time.monotonic()
        with pytest.raises(OSError):
            opened.sendall(bytes([0x82, 0xFF]) + struct.pack("!Q", 2**20) + bytes(4))
            for _ in range(100):
                opened.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - start < 3


def test_an_idle_websocket_stays_open(hasty: None) -> None:
    with running(EchoPolicy(), None) as address, RemotePolicy(f"ws://{address}") as robot:
        for _ in range(2):
            assert robot.act(observation()).actions.shape == (4, 8)
            time.sleep(1.2)  # three times as long as a message may take
        assert robot.act(observation()).actions.shape == (4, 8)


def test_endless_empty_fragments_end(hasty: None) -> None:
    with running(EchoPolicy(), None) as address, closing(upgraded(address)) as opened:
        opened.sendall(frame(2, b"", last=False))
        with suppress(OSError):
            opened.sendall(frame(0, b"", last=False) * 5000)
        assert ended_after(opened, time.monotonic()) < 4


def test_a_client_that_does_not_read_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pings whose answers are never taken: they would fill the server's memory."""
    monkeypatch.setattr(connections, "WRITE_TIMEOUT_S", 0.3)
    with running(EchoPolicy(), None) as address, closing(upgraded(address)) as opened:
        opened.settimeout(1.0)
        pings = frame(9, b"x" * 125) * 1000
        with pytest.raises(OSError):
            for _ in range(1000):
                opened.sendall(pings)
        assert httpx.get(f"http://{address}/health").status_code == 200


def test_a_client_that_reads_slowly_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "WRITE_TIMEOUT_S", 0.3)
    app = create_app(None, EchoGenerator())

    @app.get("/large")
    async def large() -> str:
        return "x" * 8_000_000

    from tests.support.serving import running_app

    with running_app(app) as address, connected(address) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        opened.sendall(GET.replace(b"/health", b"/large"))
        got, start = 0, time.monotonic()
        while got < 8_000_000:
            piece = opened.recv(200_000)
            assert piece, f"cut off after {got} bytes"
            got += len(piece)
            time.sleep(0.02)
        assert time.monotonic() - start > 0.6, "longer than two of the limits"


def test_an_access_object_is_at_the_app() -> None:
    app = create_app(None, EchoGenerator(), access=AccessControl([KEY]))
    assert app.state.access.accepts(KEY) and not app.state.access.accepts("")
    assert app.state.access.accepts(app.state.access.internal_key)
    assert KEY not in json.dumps(app.openapi())
    app.state.scheduler.close()
