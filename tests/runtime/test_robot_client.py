"""The client believes a reply only if it is the answer to its request; servers of ours return its number."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

from blm.serving import RemotePolicy
from blm.serving.client import read_actions
from blm.serving.protocols.openpi import wire
from blm.types import BlmError, ContractError, LateError
from tests.support.openpi_server import GOOD, fake_server, reply
from tests.support.serving import CONTRACT, EchoPolicy, observation, running


def test_our_server_returns_number_and_time_also_of_a_late_reply() -> None:
    class Slow(EchoPolicy):
        def act(self, seen: Any) -> Any:
            time.sleep(0.3 if seen.instruction == "slow" else 0)
            return super().act(seen)

    request = wire.to_request(observation())
    with running(Slow(), None) as address, connect(f"ws://{address}", compression=None) as socket:
        socket.recv()
        for more in ({}, {wire.REQUEST_ID: 7}, {wire.REQUEST_ID: 8, wire.OBSERVED: 1.5}, {wire.OBSERVED: 2}):
            socket.send(wire.pack({**request, **more}))
            got = wire.unpack(socket.recv())
            assert {key: got[key] for key in (wire.REQUEST_ID, wire.OBSERVED) if key in got} == more
        other = {wire.REQUEST_ID: 9, wire.OBSERVED: 3.0}
        with connect(f"ws://{address}", compression=None) as first:
            first.recv()
            first.send(wire.pack({**request, "prompt": "slow"}))
            time.sleep(0.05)
            socket.send(wire.pack({**request, **other, wire.DEADLINE: 20.0}))
            late = wire.unpack(socket.recv())
            assert late[wire.LATE] and {key: late[key] for key in other} == other
            first.recv()


@pytest.mark.parametrize(
    "key, value",
    [
        (wire.REQUEST_ID, "7"),
        (wire.REQUEST_ID, 7.0),
        (wire.REQUEST_ID, True),
        (wire.REQUEST_ID, [7]),
        (wire.OBSERVED, float("nan")),
        (wire.OBSERVED, float("inf")),
        (wire.OBSERVED, "now"),
        (wire.OBSERVED, {"a": 1}),
    ],
)
def test_our_server_refuses_invalid_numbers(key: str, value: Any) -> None:
    with pytest.raises(ContractError, match=f"'{key}' must be a"):
        wire.echo({key: value})
    with running(EchoPolicy(), None) as address, connect(f"ws://{address}", compression=None) as socket:
        socket.recv()
        socket.send(wire.pack({**wire.to_request(observation()), key: value}))
        assert key in str(socket.recv())


@pytest.mark.parametrize(
    "changes", [{wire.REQUEST_ID: 99}, {wire.OBSERVED: 0.5}, {wire.REQUEST_ID: "1"}, {wire.REQUEST_ID: None}]
)
def test_the_reply_of_another_request_is_refused_and_the_connection_closed(changes: dict[str, Any]) -> None:
    with fake_server(lambda socket, request, number: reply(socket, request, **changes)) as address:
        remote = RemotePolicy(address, timeout_s=2)
        with pytest.raises(BlmError, match="sent a reply with"):
            remote.act(observation(), request_id=1, observed_s=7.0)
        with pytest.raises(BlmError, match="reconnect"):
            remote.act(observation())
        remote.close()


@pytest.mark.parametrize("echoes", [True, False])
def test_a_duplicate_is_never_taken_for_the_next_answer(echoes: bool) -> None:
    def answer(socket: ServerConnection, request: dict[str, Any], number: int) -> None:
        for _ in range(2):
            if echoes:
                reply(socket, request)
            else:
                socket.send(wire.pack({"actions": GOOD + number}))

    with fake_server(answer) as address:
        remote = RemotePolicy(address, timeout_s=2)
        assert (remote.act(observation()).actions == 0).all()
        time.sleep(0.1)
        with pytest.raises(BlmError, match="a frame without a request"):
            remote.act(observation())
        remote.close()


def test_a_reply_after_a_timeout_is_discarded() -> None:
    def answer(socket: ServerConnection, request: dict[str, Any], number: int) -> None:
        time.sleep(0.5)
        socket.send(wire.pack({"actions": GOOD}))

    with fake_server(answer) as address:
        remote = RemotePolicy(address, timeout_s=0.2)
        with pytest.raises(BlmError, match=r"no reply from .* within 0.2 s"):
            remote.act(observation())
        time.sleep(0.5)
        with pytest.raises(BlmError, match="reconnect"):
            remote.act(observation())


def test_a_server_that_returns_nothing_of_the_request_is_still_usable() -> None:
    plain = {"camera": "OpenPI sends what it likes"}
    with fake_server(
        lambda socket, request, number: socket.send(wire.pack({"actions": GOOD})), metadata=plain
    ) as at:
        remote = RemotePolicy(at, timeout_s=2, contract=CONTRACT)
        for _ in range(3):
            assert remote.act(observation()).actions.shape == (4, 8)
        remote.close()


BAD = [
    np.full((4, 8), np.nan),
    np.full((4, 8), np.inf, np.float32),
    np.full((4, 8), 1e300),
    np.zeros((0, 8)),
    np.zeros((5, 8)),
    np.zeros((4, 7)),
    np.zeros((4, 1)),
    np.zeros(8),
    np.zeros((1, 4, 8)),
    np.zeros((4, 8), bool),
    np.zeros((4, 8), "U3"),
    np.zeros((4, 8), "M8[s]"),
    [[0.0] * 8, [0.0]],
    "text",
    None,
    {"a": 1},
    1.0,
]


@pytest.mark.parametrize("number", range(len(BAD) + 3))
def test_a_malformed_reply_is_refused_and_the_next_one_taken(number: int) -> None:
    def answer(socket: ServerConnection, request: dict[str, Any], count: int) -> None:
        if count:
            reply(socket, request)
        elif number < len(BAD):
            reply(socket, request, actions=BAD[number])
        else:
            socket.send(wire.pack([{"other": 1}, [1, 2], 7][number - len(BAD)]))

    with fake_server(answer) as address:
        remote = RemotePolicy(address, timeout_s=2)
        with pytest.raises(ContractError, match="needed"):
            remote.act(observation())
        assert (remote.act(observation()).actions == 0).all()
        remote.close()


def test_a_late_reply_needs_no_actions() -> None:
    with fake_server(lambda socket, request, number: reply(socket, request, late="too slow")) as address:
        remote = RemotePolicy(address, timeout_s=2)
        with pytest.raises(LateError, match="too slow"):
            remote.act(observation())
        remote.close()


@pytest.mark.parametrize(
    "frame", [b"", b"\xc1", b"\x01", "the server is full", wire.pack([1]), wire.pack({"horizon": 1})]
)
def test_a_server_that_greets_with_garbage_leaves_no_connection_behind(frame: bytes | str) -> None:
    before = threading.active_count()

    def handle(socket: ServerConnection) -> None:
        socket.send(frame)
        with suppress(ConnectionClosed):
            socket.recv()

    with serve(handle, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with pytest.raises(BlmError):
            RemotePolicy(f"ws://127.0.0.1:{server.socket.getsockname()[1]}", timeout_s=2)
        server.shutdown()
        thread.join(5)
    until = time.monotonic() + 3
    while threading.active_count() > before:
        assert time.monotonic() < until, threading.enumerate()
        time.sleep(0.02)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(actions=json_like)
def test_only_valid_chunks_are_accepted(actions: Any) -> None:
    try:
        chunk = read_actions({"actions": actions}, 4, 2, "the server")
    except ContractError:
        return
    assert chunk.dtype == np.float32 and chunk.shape[1:] == (2,) and 1 <= len(chunk) <= 4
    assert np.isfinite(chunk).all()
