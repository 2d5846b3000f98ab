"""Hostile peers of GR00T's port: floods, half messages, bombs, batches; neighbours notice nothing."""

from __future__ import annotations

import io
import itertools
import re
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blm.serving.protocols.groot import codec, zmtp
from blm.serving.protocols.groot import server as groot
from blm.serving.scheduler import SchedulerLimits
from blm.types import ActionChunk, BlmError, Observation
from tests.support.groot import Client, batch, running
from tests.support.serving import CONTRACT, EchoPolicy, observation, wait_for

MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
LIMIT = codec.message_limit(CONTRACT)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running(EchoPolicy()) as found:
        yield found


@contextmanager
def connected(port: int, token: str | None = None) -> Iterator[Client]:
    client = Client(port, token)
    try:
        yield client
    finally:
        client.close()


def assert_served(port: int) -> None:
    with connected(port) as client:
        actions, _ = client.call("get_action", batch(observation()))
        np.testing.assert_array_equal(actions["arm"][0], EchoPolicy().act(observation()).actions[:, :-1])


# --- peers that speak to the port without libzmq ---

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x03REQ"
HELLO = GREETING + b"\x04" + bytes([len(READY)]) + READY
PING = msgpack.packb({"endpoint": "ping"})


def message(body: bytes) -> bytes:
    return b"\x01\x00" + b"\x02" + len(body).to_bytes(8, "big") + body


def raw(port: int, sent: bytes = HELLO) -> socket.socket:
    peer = socket.create_connection(("127.0.0.1", port), timeout=10)
    peer.sendall(sent)
    return peer


def answer(peer: socket.socket) -> Any:
    """The next reply to a raw peer, after the greeting when that has not been read yet."""
    got = b""
    while True:
        part = peer.recv(65536)
        assert part, "the server closed the connection"
        got += part
        at = got.find(b"\x01\x00")  # the envelope of a reply
        while at >= 0:
            for header, size in ((2, got[at + 3 : at + 4]), (9, got[at + 3 : at + 11])):
                body = got[at + 2 + header :]
                if (
                    size
                    and got[at + 2] == (0 if header == 2 else 2)
                    and len(body) == int.from_bytes(size, "big")
                ):
                    return msgpack.unpackb(body)
            at = got.find(b"\x01\x00", at + 1)


def pinged(port: int, within_s: float = 10.0) -> socket.socket:
    """A connection whose first request was answered; decoded again while the server has no place for it."""
    end = time.monotonic() + within_s
    while True:
        peer = raw(port, b"")
        try:
            peer.sendall(HELLO + message(PING))
            assert answer(peer)["status"] == "ok"
            return peer
        except (AssertionError, ConnectionError):
            peer.close()
            assert time.monotonic() < end, f"no place within {within_s} s"
            time.sleep(0.05)


def is_closed(peer: socket.socket) -> bool:
    try:
        while peer.recv(65536):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def test_a_raw_request_is_answered(port: int) -> None:
    with raw(port, HELLO + message(PING)) as peer:
        assert answer(peer)["status"] == "ok"


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(64),
        GREETING.replace(b"NULL", b"CURV"),
        GREETING[:10] + b"\x01" + GREETING[11:],
        GREETING + message(PING),
        GREETING + b"\x06" + (2**62).to_bytes(8, "big"),
        HELLO + b"\x02" + (2**63 + 5).to_bytes(8, "big"),
        HELLO + b"\x01\x00\x02" + (LIMIT + 4096).to_bytes(8, "big"),
        HELLO + b"\x01\x00" * 9,
        HELLO + b"\x00\x00",
        HELLO + b"\x00\x01x",
        HELLO + b"\x01\x01x\x00\x01y",
        HELLO + b"\x01\x00\x01\x01y\x00\x01z",
        HELLO + b"\xf8\x00",
        HELLO + b"\x05\x00",
    ],
    ids=lambda sent: repr(sent[-12:]),
)
def test_protocol_violations_close_the_connection(port: int, sent: bytes) -> None:
    with raw(port, sent) as peer:
        assert is_closed(peer)
    assert_served(port)


def test_a_flood_of_parts_costs_nothing(port: int) -> None:
    """libzmq keeps them all until the last has come: 64 bytes of memory for two on the wire."""
    with raw(port) as peer, pytest.raises(ConnectionError):
        for _ in range(1000):
            peer.sendall(b"\x01\x00" * 50_000)
    assert_served(port)


def test_a_ping_of_the_protocol_is_answered_and_a_flood_of_them_ends(port: int) -> None:
    ping = b"\x04\x0c\x04PING\x00\x10abcde"
    with raw(port, HELLO + ping) as peer:
        got = b""
        while b"\x04PONGabcde" not in got:
            got += peer.recv(1000)
    with raw(port, HELLO + message(PING)) as peer, pytest.raises(ConnectionError):
        for _ in range(2000):
            peer.sendall(ping * 10_000)
    assert_served(port)


def test_a_peer_that_does_not_read_is_disconnected(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmtp, "WRITE_TIMEOUT_S", 0.3)
    ask = message(msgpack.packb({"endpoint": "get_modality_config"}))
    with raw(port) as peer, pytest.raises(ConnectionError):
        for _ in range(100_000):
            peer.sendall(ask * 100)
    assert_served(port)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        GREETING[:20],
        GREETING,
        HELLO,
        HELLO + b"\x01",
        HELLO + message(PING)[:-3],
        HELLO + message(b"\xc1"),
    ],
    ids=lambda sent: str(len(sent)),
)
def test_half_a_request_is_not_waited_for(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groot, "REQUEST_TIMEOUT_S", 0.3)
    with running(EchoPolicy()) as port, raw(port, sent) as peer:
        assert is_closed(peer)


def test_a_client_that_has_asked_may_pause_between_requests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groot, "REQUEST_TIMEOUT_S", 1.0)
    with running(EchoPolicy()) as port:
        with raw(port, HELLO + message(PING)) as peer:
            assert answer(peer)["status"] == "ok"
            time.sleep(1.5)
            peer.sendall(message(PING))
            assert answer(peer)["status"] == "ok"
            peer.sendall(message(PING)[:-3])  # it must end what it begins
            assert is_closed(peer)
        assert_served(port)


def test_connections_that_ask_nothing_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groot, "MAX_CLIENTS", 4)
    with running(EchoPolicy()) as port, ExitStack() as stack:
        idle = [stack.enter_context(raw(port)) for _ in range(20)]
        assert_served(port)
        assert all(is_closed(peer) for peer in idle[:16])
        for peer in idle[16:]:
            peer.close()
        # One after another, and again where the server has not yet noticed that earlier clients left.
        busy = [stack.enter_context(pinged(port)) for _ in range(4)]
        assert is_closed(stack.enter_context(raw(port)))  # all have asked: nobody is cut off for a newcomer
        busy[0].close()
        pinged(port).close()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_on_the_port(port: int, sent: bytes, greeted: bool) -> None:
    with raw(port, (HELLO if greeted else b"") + sent) as peer:
        peer.shutdown(socket.SHUT_WR)
        assert is_closed(peer)


def test_the_port_after_any_bytes(port: int) -> None:
    assert_served(port)


# --- libzmq's other ways to ask ---


def test_options_of_libzmq_sockets_are_understood(port: int) -> None:
    with zmq.Context() as context, context.socket(zmq.REQ) as careful, context.socket(zmq.DEALER) as dealer:
        for option in (zmq.REQ_CORRELATE, zmq.REQ_RELAXED):
            careful.setsockopt(option, 1)
        careful.setsockopt(zmq.HEARTBEAT_IVL, 50)
        careful.setsockopt(zmq.IDENTITY, b"i" * 255)
        for one in (careful, dealer):
            one.setsockopt(zmq.RCVTIMEO, 10_000)
            one.setsockopt(zmq.LINGER, 0)
            one.connect(f"tcp://127.0.0.1:{port}")
        careful.send(PING)
        assert msgpack.unpackb(careful.recv())["status"] == "ok"
        time.sleep(0.3)
        for number in range(20):
            dealer.send_multipart([b"way back", b"%d" % number, b"", PING])
        for number in range(20):
            *envelope, reply = dealer.recv_multipart()
            assert envelope == [b"way back", b"%d" % number, b""] and msgpack.unpackb(reply)["status"] == "ok"


# --- what a message may hold ---


def npy(
    descr: str, shape: Any, data: bytes = b"", version: int = 1, header: str | None = None
) -> dict[str, Any]:
    text = header or repr({"descr": descr, "fortran_order": False, "shape": shape})[:-1] + ", }"
    length = len(text) + 1
    size = length.to_bytes(2 if version == 1 else 4, "little")
    file = b"\x93NUMPY" + bytes([version, 0]) + size + text.encode() + b"\n" + data
    return {"__ndarray_class__": True, "as_npy": file}


def with_part(value: Any, *path: str) -> bytes:
    data = batch(observation())
    inner: Any = {"observation": data["observation"]}["observation"]
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return msgpack.packb({"data": data}, default=codec._encode)


def filled(item: bytes) -> bytes:
    count = (LIMIT - 50) // len(item)
    return b"\x82\xa4data\xdd" + count.to_bytes(4, "big") + item * count + b"\xa9api_token\xa1x"


LANGUAGE = ("language", "annotation.human.task_description")
PYTHON_2 = "{'descr': '<f4', 'fortran_order': False, 'shape': (1L,), }"
FIELDS = "{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (1,), }"
ARM = ("state", "arm")
BASE = ("video", "base")
BOMBS = {
    "U0 as language": (with_part(npy("<U0", (2**40,)), *LANGUAGE), "not the header of an array of numbers"),
    "S0": (with_part(npy("|S0", (2**40,)), *ARM), "not the header of an array of numbers"),
    "V0": (with_part(npy("|V0", (2**40,)), *ARM), "not the header of an array of numbers"),
    "i0": (with_part(npy("<i0", (2**40,)), *ARM), "data type"),
    "objects": (with_part(npy("|O", (1,), b"cos\nsystem\n"), *ARM), "not the header"),
    "rows of nothing": (with_part(npy("<f4", (2**40, 1, 0)), *ARM), "does not have 0 bytes"),
    "rows beyond 64 bits": (with_part(npy("<f4", (2**64, 2**64)), *ARM), "does not have 0 bytes"),
    "rows without data": (with_part(npy("<f4", (2**40, 1, 7)), *ARM), "does not have 0 bytes"),
    "negative": (with_part(npy("<f4", (-1, -1, 7)), *ARM), "not the header"),
    "brackets": (with_part(npy("", (), header="(" * 5000), *ARM), "not the header"),
    "minus": (with_part(npy("", (), header="-" * 900 + "1"), *ARM), "not the header"),
    "half a text": (with_part(npy("", (), header="'"), *ARM), "not the header"),
    "numbers of Python 2": (
        with_part(npy("", (), header=PYTHON_2), *ARM),
        "not the header",
    ),
    "header of 64 kB": (with_part(npy("<f4", (1,), header=" " * 65_000), *ARM), "not the header"),
    "structures": (with_part(npy("", (), header=FIELDS), *ARM), "not the header"),
    "version 9": (with_part(npy("<f4", (1, 1, 7), bytes(28), version=9), *ARM), "not a .npy file"),
    "a number as file": (with_part({"__ndarray_class__": True, "as_npy": 2**40}, *ARM), "not a .npy"),
    "language as numbers": (with_part(np.zeros((1, 1)), *LANGUAGE), "language must be a list of texts"),
    "language as a text": (with_part("push", *LANGUAGE), "language must be a list of texts"),
    "language as bytes": (with_part([[b"push"]], *LANGUAGE), "one of them is b'push'"),
    "language of lists": (with_part([[[["push"]]]], *LANGUAGE), "language must be a list of texts"),
    "no text": (with_part([[]], *LANGUAGE), r"one of them is \[\]"),
    "a long text": (with_part([["x" * 401]], *LANGUAGE), "at most 400 bytes"),
    "a longer text": (with_part([["x" * 10_000]], *LANGUAGE), "at most 4096"),
    "states of texts": (with_part([["1"] * 7], *ARM), "state.arm must be an array"),
    "states of booleans": (with_part(np.ones((1, 2, 7), bool), *ARM), "state.arm must be an array"),
    "one state": (with_part(np.ones(7), *ARM), "state.arm must be an array with 3 dimensions"),
    "no frame": (with_part(np.ones((1, 0, 7)), *ARM), "state.arm has no frame"),
    "states that are not finite": (with_part(np.full((1, 1, 7), np.nan), *ARM), "not finite"),
    "pictures of floats": (with_part(np.zeros((1, 1, 8, 8, 3)), *BASE), "video.base must be an array"),
    "pictures of signs": (with_part(np.zeros((1, 1, 8, 8, 3), np.int8), *BASE), "video.base must be"),
    "pictures of numbers": (with_part(np.zeros((1, 1, 8, 8, 3), "<u4"), *BASE), "needed: uint8"),
    "another batch": (with_part(np.zeros((2, 1, 8, 8, 3), np.uint8), *BASE), "one batch of 1 to 32"),
    "empty maps": (filled(b"\x80"), "more than .* items"),
    "empty lists": (filled(b"\x90"), "more than .* items"),
    "arrays": (filled(msgpack.packb(npy("<f4", (0,)))), "more than .* items"),
    "levels": (b"\x81\xa4data" + b"\x91" * 1_000_000 + b"\x00", "levels"),
    "a key of megabytes": (msgpack.packb({"x" * 2_000_000: 1}), "at most 4096"),
    "an endpoint of text": (msgpack.packb({"endpoint": "x" * 4000}), "unknown endpoint 'xxx"),
    "an endpoint of maps": (msgpack.packb({"endpoint": [{}] * 900}), "unknown endpoint"),
    "flat keys": (msgpack.packb({"data": {"video.base": 1, "state.arm": 2}}), "lacks 'observation'.*nested"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_at_little_cost(name: str) -> None:
    sent, reason = BOMBS[name]
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(BlmError) as refused:
        request = codec.read_request(sent, None)
        if isinstance(request.get("endpoint"), str | list):
            raise BlmError(f"unknown endpoint {str(request['endpoint'])[:40]!r}")
        codec.to_observations(request.get("data"), CONTRACT)
    took, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert re.search(reason, str(refused.value)) and len(str(refused.value)) < 1200
    assert peak < len(sent) + 2**20 and took < 0.5


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_told_and_the_connection_stays(port: int, name: str) -> None:
    sent, reason = BOMBS[name]
    with connected(port) as client:
        told = client.send(sent)["error"]
        assert re.search(reason, told) and len(told) < 1200 and "policy failed" not in told
        assert client.call("ping")["status"] == "ok"


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("order", ["C", "F"])
def test_files_of_every_version_and_order_are_read(version: int, order: Any) -> None:
    value = np.asarray(np.random.default_rng(0).normal(size=(2, 3, 7)), order=order)
    out = io.BytesIO()
    np.lib.format.write_array(out, value, version=(version, 0), allow_pickle=False)
    sent = msgpack.packb({"a": {"__ndarray_class__": True, "as_npy": out.getvalue()}})
    np.testing.assert_array_equal(codec.unpack(sent)["a"], value)


@MANY
@given(
    st.sampled_from(["|u1", "<f4", ">f8", "<f2", "<i8", ">i2", "|b1"]),
    st.lists(st.integers(0, 4), max_size=5).map(tuple),
    st.booleans(),
)
def test_every_array_of_numbers_comes_back(dtype: str, shape: tuple[int, ...], transposed: bool) -> None:
    value = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    value = value.T if transposed else value
    got = codec.unpack(codec.pack({"a": value}))["a"]
    assert got.dtype == value.dtype and got.shape == value.shape and (got == value).all()


@MANY
@given(st.binary(max_size=300), st.integers(0, 2000), st.booleans())
def test_a_damaged_message_is_read_or_refused(patch: bytes, at: int, keyed: bool) -> None:
    sent = codec.pack({"data": batch(observation()), "api_token": "sesame"})
    at %= len(sent)
    sent = sent[:at] + patch + sent[at + len(patch) :]
    try:
        request = codec.read_request(sent, "sesame".__eq__ if keyed else None)
        assert not keyed or request["api_token"] == "sesame"
        codec.to_observations(request.get("data"), CONTRACT)
    except BlmError as error:
        assert len(str(error)) < 1200


# --- the key ---


@pytest.mark.parametrize(
    "token",
    [None, "", "wrong", b"sesame", ["sesame"], 1, True, "x" * 4000, "sesam\u00e9", {"sesame": 1}],
    ids=repr,
)
def test_nothing_is_decoded_without_the_key(token: Any) -> None:
    bad = npy("<f4", (2**40,))  # decoding it would be another error
    for request in (
        {"data": bad, "api_token": token},
        {"api_token": "sesame", "data": bad, "api_tokem": token},
    ):
        with pytest.raises(BlmError) as refused:
            codec.read_request(msgpack.packb(request), "sesame".__eq__)
        expected = "does not have" if request["api_token"] == "sesame" else "wrong or missing api_token"
        assert expected in str(refused.value)


def test_the_last_of_two_keys_counts_as_in_the_map_that_msgpack_makes() -> None:
    for first, last in (("sesame", "wrong"), ("wrong", "sesame")):
        twice = b"\x82" + b"".join(msgpack.packb("api_token") + msgpack.packb(key) for key in (first, last))
        if last == "sesame":
            assert codec.read_request(twice, "sesame".__eq__)["api_token"] == "sesame"
        else:
            with pytest.raises(BlmError, match="api_token"):
                codec.read_request(twice, "sesame".__eq__)
    for other in (b"\x90", b"\x80", b"\xc0", b"\xa9api_token"):
        with pytest.raises(BlmError, match="api_token"):
            codec.read_request(other, "sesame".__eq__)


def test_a_wrong_key_is_told_before_anything_else() -> None:
    with running(EchoPolicy(), api_key="sesame") as port:
        with connected(port) as stranger:
            for sent, _ in BOMBS.values():
                assert set(stranger.send(sent)) == {"error"}
            assert "api_token" in stranger.call("get_action", batch(observation()))["error"]
        with connected(port, "sesame") as friend:
            assert friend.call("ping")["status"] == "ok"


# --- batches ---


class Slow(EchoPolicy):
    """Takes a while for each pass of observations, and notes whose they are by their seeds."""

    def __init__(self) -> None:
        super().__init__()
        self.passes, self.took_s = list[list[int]](), 0.02

    def act_batch(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        if observations[0].instruction != "hold still.":  # of the warm-up
            time.sleep(self.took_s)
            self.passes.append([one.seed for one in observations])
        return [self.act(one) for one in observations]


def test_batches_are_answered_up_to_a_limit(port: int) -> None:
    seen = [observation(seed=5) for _ in range(codec.MAX_ROWS)]
    with connected(port) as client:
        actions, _ = client.call("get_action", batch(*seen))
        assert actions["arm"].shape == (codec.MAX_ROWS, 4, 7)
        for rows in (codec.MAX_ROWS + 1, 400):
            told = client.call("get_action", batch(*(observation(seed=5) for _ in range(rows))))["error"]
            assert f"one batch of 1 to 32, got {rows}" in told
        empty = batch(observation())
        for kind in ("video", "state"):
            empty["observation"][kind] = {k: v[:0] for k, v in empty["observation"][kind].items()}
        empty["observation"]["language"] = {"x": []}
        assert "one batch of 1 to 32, got 0" in client.call("get_action", empty)["error"]


def test_a_large_batch_does_not_hold_up_another_client() -> None:
    policy = Slow()
    with (
        running(policy, scheduler_limits=SchedulerLimits(max_action_batch=4)) as port,
        connected(port) as big,
    ):
        thread = threading.Thread(
            target=lambda: big.call("get_action", batch(*(observation(seed=1) for _ in range(32))))
        )
        thread.start()
        wait_for(lambda: len(policy.passes) >= 1)
        with connected(port) as small:
            small.call("get_action", batch(observation(seed=2)))
            passes = len(policy.passes)
        thread.join()
    mine = next(number for number, seeds in enumerate(policy.passes) if 2 in seeds)
    assert mine <= 4 and passes < len(policy.passes), policy.passes


def test_rows_end_when_one_of_them_fails() -> None:
    policy = Slow()
    data = batch(*(observation(seed=1) for _ in range(32)))
    texts = data["observation"]["language"]["annotation.human.task_description"]
    texts[0] = ["break"]
    with (
        running(policy, scheduler_limits=SchedulerLimits(max_action_batch=1)) as port,
        connected(port) as client,
    ):
        assert "the weights are gone" in client.call("get_action", data)["error"]
        time.sleep(0.2)
        assert len(policy.passes) <= 3
        actions, _ = client.call("get_action", batch(observation()))
        np.testing.assert_array_equal(actions["arm"][0], policy.act(observation()).actions[:, :-1])


def test_rows_are_cancelled_when_the_client_disconnects() -> None:
    policy = Slow()
    with running(policy, scheduler_limits=SchedulerLimits(max_action_batch=1)) as port:
        data = batch(*(observation(seed=1) for _ in range(32)))
        with raw(port, HELLO + message(codec.pack({"data": data}))):
            wait_for(lambda: len(policy.passes) >= 2)
        time.sleep(0.3)
        assert len(policy.passes) < 12
        assert_served(port)


def test_a_row_that_breaks_the_contract_stops_all_before_they_are_queued() -> None:
    policy = Slow()
    data = batch(*(observation(seed=1) for _ in range(32)))
    data["observation"]["state"]["arm"][31, -1, 3] = np.nan
    with running(policy) as port, connected(port) as client:
        assert "not finite in joint4" in client.call("get_action", data)["error"]
    assert policy.passes == []


def test_all_clients_at_once_get_their_own() -> None:
    with running(EchoPolicy()) as port, ExitStack() as stack:
        clients = [stack.enter_context(connected(port)) for _ in range(24)]
        for seed, client in enumerate(clients):
            request = {"endpoint": "get_action", "data": batch(observation(seed=seed))}
            client.socket.send(codec.pack(request))
        for seed, client in itertools.islice(enumerate(clients), None):
            actions, _ = codec.unpack(client.socket.recv())
            expected = EchoPolicy().act(observation(seed=seed)).actions
            np.testing.assert_array_equal(actions["gripper"][0], expected[:, -1:])
