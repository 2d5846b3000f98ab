"""RemotePolicy against servers that do what they should not: each ends in one plain BlmError, and in time."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http import HTTPStatus
from typing import Any

import numpy as np
import pytest
from websockets.sync.server import ServerConnection, serve
from websockets.utils import accept_key

from blm.addresses import is_loopback_url
from blm.evaluation.digital.endpoint import Endpoint
from blm.serving.client import RemotePolicy
from blm.serving.protocols.openpi import wire
from blm.types import BlmError, ContractError
from tests.support.serving import CONTRACT, EchoPolicy, observation, running

METADATA = wire.pack(CONTRACT.to_json())
Handler = Callable[[ServerConnection], None]


@contextmanager
def hostile(handler: Handler, **options: Any) -> Iterator[str]:
    """A websocket server that does what `handler` says; gives its address."""

    def handle(opened: ServerConnection) -> None:
        with suppress(Exception):
            handler(opened)

    with serve(handle, "127.0.0.1", 0, **options) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def bare(answer: bytes, *, hold: bool = False) -> Iterator[str]:
    """A TCP server that answers whatever comes with these bytes, then closes or stays silent."""
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            with suppress(OSError):
                opened, _ = listening.accept()
                with opened:
                    opened.recv(65536)
                    opened.sendall(answer)
                    if hold:
                        done.wait(5)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.1)
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            done.set()
            thread.join()


def reply_with(*frames: bytes | str) -> Handler:
    def handler(opened: ServerConnection) -> None:
        opened.send(METADATA)
        opened.recv()
        for frame in frames:
            opened.send(frame)
        time.sleep(1)

    return handler


def actions(value: Any) -> bytes:
    return wire.pack({"actions": value})


GOOD = np.zeros((4, 8), np.float32)
BAD_REPLIES: dict[str, tuple[bytes | str, str]] = {
    "text": ("the policy is out of memory", "reports: the policy is out of memory"),
    "long text": ("x" * 100_000, "reports: xxx"),
    "no actions": (wire.pack({"action": GOOD}), r"has \['action'\]; needed: 'actions'"),
    "a list": (wire.pack([1, 2]), "a list as its reply; needed: a map"),
    "a number": (wire.pack(3), "an? int as its reply"),
    "nothing": (wire.pack(None), "a NoneType as its reply"),
    "flat": (actions(GOOD[0]), r"\(8,\); needed"),
    "one joint fewer": (actions(GOOD[:, :7]), r"\(4, 7\); needed"),
    "one joint more": (actions(np.zeros((4, 9))), r"\(4, 9\); needed"),
    "empty": (actions(GOOD[:0]), "0 steps; needed"),
    "endless": (actions(np.zeros((5000, 8), np.float16)), "5000 steps; needed"),
    "deep": (actions(np.zeros((1, 4, 8))), r"\(1, 4, 8\); needed"),
    "text actions": (actions("left"), "<U4 .*; needed"),
    "ragged": (actions([[1.0], [1.0, 2.0]]), "not an array: "),
    "map actions": (actions({"left": 1}), "object .*; needed"),
    "NaN": (actions(np.full((4, 8), np.nan)), "not finite"),
    "infinite": (actions(np.full((4, 8), np.inf)), "not finite"),
    "overflow": (actions(np.full((4, 8), 1e300)), "not finite"),
    "not msgpack": (b"\xc1\xff\x00", "cannot be read"),
    "cut": (actions(GOOD)[:-5], "cannot be read"),
    "no bytes": (b"", "cannot be read"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("frame, message", BAD_REPLIES.values(), ids=BAD_REPLIES)
def test_bad_replies_are_blm_errors(frame: bytes | str, message: str) -> None:
    with hostile(reply_with(frame)) as uri, RemotePolicy(uri, timeout_s=5) as remote:
        with pytest.raises(BlmError, match=message) as caught:
            remote.act(observation())
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def close_with(code: int, reason: str = "") -> Handler:
    def handler(opened: ServerConnection) -> None:
        opened.send(METADATA)
        opened.recv()
        opened.close(code, reason)

    return handler


def vanish(opened: ServerConnection) -> None:
    opened.send(METADATA)
    opened.recv()
    opened.socket.shutdown(socket.SHUT_RDWR)


def half_frame(opened: ServerConnection) -> None:
    opened.send(METADATA)
    opened.recv()
    opened.socket.sendall(bytes([0x82, 100]) + b"abc")
    opened.socket.shutdown(socket.SHUT_RDWR)


def never(opened: ServerConnection) -> None:
    opened.send(METADATA)
    time.sleep(2)


def dripping(opened: ServerConnection) -> None:
    opened.send(METADATA)
    opened.recv()
    opened.socket.sendall(bytes([0x82, 126]) + (60_000).to_bytes(2, "big"))
    for _ in range(40):
        opened.socket.sendall(b"x")
        time.sleep(0.05)


def too_large(opened: ServerConnection) -> None:
    opened.send(METADATA)
    opened.recv()
    opened.socket.sendall(bytes([0x82, 127]) + (2**40).to_bytes(8, "big"))
    time.sleep(1)


CLOSING: dict[str, tuple[Handler, str]] = {
    "normal": (close_with(1000), "closed the connection"),
    "going away": (close_with(1012, "restart"), "closed the connection.*restart"),
    "refused": (close_with(1008, "policy"), "closed the connection"),
    "error": (close_with(1011, "out of memory"), "out of memory"),
    "own code": (close_with(4321, "mine"), "4321"),
    "vanished": (vanish, "closed the connection"),
    "half a frame": (half_frame, "closed the connection"),
    "silent": (never, "no reply from .* within 0.5 s"),
    "dripping": (dripping, "no reply from .* within 0.5 s"),
    "too large": (too_large, "closed the connection"),
}


@pytest.mark.parametrize("handler, message", CLOSING.values(), ids=CLOSING)
def test_lost_connections_are_blm_errors_in_time(handler: Handler, message: str) -> None:
    with hostile(handler) as uri, RemotePolicy(uri, timeout_s=0.5) as remote:
        start = time.monotonic()
        with pytest.raises(BlmError, match=message):
            remote.act(observation())
        with pytest.raises(BlmError, match="closed"):
            remote.act(observation())
        remote.close()
        assert time.monotonic() - start < 3


FIRST_FRAMES: dict[str, tuple[Handler, type[BlmError], str]] = {
    "no metadata": (lambda opened: time.sleep(1.5), BlmError, "no reply from"),
    "closed at once": (lambda opened: opened.close(1013, "full"), BlmError, "closed the connection.*full"),
    "text": (lambda opened: opened.send("busy"), BlmError, "reports: busy"),
    "a number": (lambda opened: opened.send(wire.pack(3)), ContractError, "no policy contract"),
    "empty map": (lambda opened: opened.send(wire.pack({})), ContractError, "no policy contract"),
    "odd contract": (
        lambda opened: opened.send(wire.pack({**CONTRACT.to_json(), "action_spaces": 5})),
        ContractError,
        "no policy contract",
    ),
    "garbage": (lambda opened: opened.send(b"\xc1"), BlmError, "cannot be read"),
}


@pytest.mark.parametrize("handler, kind, message", FIRST_FRAMES.values(), ids=FIRST_FRAMES)
def test_an_invalid_first_message_is_refused(handler: Handler, kind: type[BlmError], message: str) -> None:
    start = time.monotonic()
    with hostile(handler) as uri, pytest.raises(kind, match=message):
        RemotePolicy(uri, timeout_s=0.5)
    assert time.monotonic() - start < 4


OTHER_SERVERS = {
    "a web page": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "status 200"),
    "not found": (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "status 404"),
    "a redirect to elsewhere": (
        b"HTTP/1.1 302 Found\r\nLocation: ftp://x\r\nContent-Length: 0\r\n\r\n",
        "is not a policy server|not of the form|status 302",
    ),
    "no HTTP": (b"220 mail.example ESMTP\r\n", "is not a policy server"),
    "nothing": (b"", "is not a policy server"),
    "binary": (bytes(range(256)), "is not a policy server"),
}


@pytest.mark.parametrize("answer, message", OTHER_SERVERS.values(), ids=OTHER_SERVERS)
def test_a_server_of_another_kind_is_reported(answer: bytes, message: str) -> None:
    with bare(answer) as uri, pytest.raises(BlmError, match=message):
        RemotePolicy(uri, timeout_s=2)


def test_a_handshake_that_never_ends() -> None:
    with bare(b"HTTP/1.1 101 Switch", hold=True) as uri, pytest.raises(BlmError):
        RemotePolicy(uri, timeout_s=0.5)


def test_the_reason_of_a_refusal_is_reported() -> None:
    def refuse(opened: ServerConnection, request: Any) -> Any:
        text = json.dumps({"error": {"message": "the robot is at lunch\nsoon back"}})
        return opened.respond(HTTPStatus.CONFLICT, text)

    told = "status 409: the robot is at lunch soon back"
    with hostile(never, process_request=refuse) as uri, pytest.raises(BlmError, match=told):
        RemotePolicy(uri)


@pytest.mark.parametrize(
    "uri",
    ["", "127.0.0.1:8000", "http://127.0.0.1:8000", "ws://", "ws://a b", "ws://[::1", "ws://127.0.0.1:99999"],
)
def test_malformed_addresses(uri: str) -> None:
    with pytest.raises(BlmError):
        RemotePolicy(uri, timeout_s=0.5)


def test_a_server_that_reads_nothing_does_not_hold_a_robot() -> None:
    """An observation larger than all buffers on the way: sending it ends after the timeout too."""
    contract = wire.pack(replace(CONTRACT, image_size=2000).to_json())

    def run() -> None:
        opened, _ = listening.accept()
        with opened:
            request = opened.recv(65536).decode()
            key = request.lower().split("sec-websocket-key: ")[1].split("\r\n")[0]
            key = request[request.lower().index(key) :][: len(key)]
            lines = ["HTTP/1.1 101 S", "Upgrade: websocket", "Connection: Upgrade"]
            head = "\r\n".join([*lines, f"Sec-WebSocket-Accept: {accept_key(key)}", "", ""])
            opened.sendall(head.encode() + bytes([0x82, 126]) + len(contract).to_bytes(2, "big") + contract)
            done.wait(10)

    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=run)
        thread.start()
        try:
            with RemotePolicy(f"ws://127.0.0.1:{listening.getsockname()[1]}", timeout_s=1) as remote:
                start = time.monotonic()
                with pytest.raises(BlmError):
                    remote.act(observation(size=2000))
            assert time.monotonic() - start < 5
        finally:
            done.set()
            thread.join()


# --- proxies ---


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "WS_PROXY", "WSS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.lower(), "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)


def test_loopback_needs_no_proxy(proxied: None) -> None:
    from blm.types import Message
    from tests.support.serving import EchoGenerator

    with running(EchoPolicy(), EchoGenerator()) as address:
        port = address.partition(":")[2]
        for host in ("127.0.0.1", "localhost", "LOCALHOST"):
            with RemotePolicy(f"ws://{host}:{port}") as remote:
                assert remote.act(observation()).actions.shape == (4, 8)
        endpoint = Endpoint("BLM", f"http://{address}/v1")
        assert endpoint.answer([Message("user", ("hi",))]) == "user: hi"
        endpoint.close()


def test_other_hosts_use_the_proxy_of_the_user(proxied: None) -> None:
    with pytest.raises(BlmError, match="policy server"):
        RemotePolicy(
            "ws://198.51.100.1:8000", timeout_s=5
        )  # the proxy refuses at once; the host never answers


def test_a_proxy_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "gopher://127.0.0.1:9")
    with pytest.raises(BlmError, match="proxy"):
        Endpoint("m", "http://198.51.100.1/v1")


@pytest.mark.parametrize(
    "url, expected",
    {
        "ws://127.0.0.1": True, "http://127.1.2.3:80/v1": True, "ws://localhost:8000": True,
        "ws://[::1]:1": True,
        "ws://LocalHost.": True, "ws://[::ffff:127.0.0.1]": True, "ws://127.0.0.1.evil.com": False, "": False,
        "ws://10.0.0.1": False, "ws://localhost.evil.com": False, "ws://user@localhost": True,
        "ws://[": False,
        "http://evil.com/127.0.0.1": False, "http://evil.com#@127.0.0.1": False, "0.0.0.0": False,
    }.items(),
)  # fmt: skip
def test_loopback_addresses_are_recognised(url: str, expected: bool) -> None:
    assert is_loopback_url(url) is expected
