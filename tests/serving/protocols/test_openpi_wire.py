"""Hostile peers of the OpenPI socket: what a frame may cost, what an array may be, what the others notice."""

from __future__ import annotations

import pickle
import socket
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openpi_client import msgpack_numpy
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from blm.serving.access.connections import MAX_FRAGMENTS
from blm.serving.app import create_app
from blm.serving.client import RemotePolicy
from blm.serving.protocols.msgpack_limits import MAX_DEPTH, check_limits
from blm.serving.protocols.openpi import wire
from blm.serving.scheduler import SchedulerLimits
from blm.types import (
    MAX_INSTRUCTION,
    BlmError,
    ContractError,
    Observation,
    PolicyContract,
    UnknownNameError,
    lookup,
    shorten,
)
from tests.support.serving import CONTRACT, BatchEcho, EchoPolicy, observation, running, running_app, wait_for

MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
LIMIT = wire.frame_limit(CONTRACT)
ITEMS = wire.item_limit(CONTRACT)


def request(**changed: Any) -> dict[str, Any]:
    """A right request; names in `changed` have `/` written as `__`."""
    return {**wire.to_request(observation()), **{key.replace("__", "/"): v for key, v in changed.items()}}


def frame_of(**changed: Any) -> bytes:
    return wire.pack(request(**changed))


def read(frame: bytes) -> Observation:
    """What the server does with a frame."""
    return wire.to_observation(wire.unpack(frame, ITEMS), CONTRACT)


def array(dtype: Any, shape: Any, data: Any = b"") -> dict[bytes, Any]:
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}


# --- what a frame may cost ---


def filled(item: bytes) -> bytes:
    """A list of the largest size that a frame may have, of this item over and over."""
    count = (LIMIT - 5) // len(item)
    return b"\xdd" + count.to_bytes(4, "big") + item * count


TINY_MAPS = msgpack.packb({"x": 1, "y": [{}, {}, {}]})
ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty maps": (lambda: filled(b"\x80"), "more than .* items"),
    "empty lists": (lambda: filled(b"\x90"), "more than .* items"),
    "maps in lists in maps": (lambda: filled(TINY_MAPS), "more than .* items"),
    "small numbers": (lambda: filled(b"\x01"), "more than .* items"),
    "short texts": (lambda: filled(b"\xa3abc"), "more than .* items"),
    "arrays without elements": (lambda: filled(wire.pack(array("<f4", [0]))), "more than .* items"),
    "levels": (lambda: b"\x91" * (LIMIT - 1) + b"\x00", "levels"),
    "levels below the root of a map": (lambda: b"\x81\xa1x" * 100_000 + b"\x00", "levels"),
    "announced only": (lambda: b"\xdd\xff\xff\xff\xff", "more than .* items"),
    "announced data": (lambda: b"\xc6\xff\xff\xff\xff", "truncated"),
    "a second message": (lambda: frame_of() * 2, "follow the end"),
    "keys": (lambda: msgpack.packb({str(i): i for i in range(150_000)}), "more than .* items"),
    "state of many numbers": (lambda: frame_of(observation__state=[0.0] * 200_000), "send arrays"),
    "picture as lists": (
        lambda: frame_of(observation__images__base=np.zeros((224, 224, 3), int).tolist()),
        "send arrays",
    ),
    "robot of megabytes": (lambda: frame_of(robot="panda " * (LIMIT // 7)), "at most 4096"),
    "robot of bytes": (lambda: frame_of(robot=b"panda" * (LIMIT // 6)), "'robot' must be str"),
    "robot of 4000": (lambda: frame_of(robot="x" * 4000), "unknown robot 'xxx"),
    "prompt of a megabyte": (lambda: frame_of(prompt="x" * 2**20), "at most 4096, and 400 as instruction"),
    "prompt of 401": (lambda: frame_of(prompt="x" * 401), "needed: text of at most 400 bytes of UTF-8"),
    "prompt of four-byte characters": (lambda: frame_of(prompt="\U0001f916" * 101), "at most 400 bytes"),
    "elements without size": (lambda: frame_of(observation__state=array("<U0", [2**40])), "does not have 0"),
    "elements without size, named": (lambda: frame_of(robot=array("|S0", [2**60])), "does not have 0 bytes"),
    "rows without elements": (lambda: frame_of(chunk=array("<f4", [2**62, 0])), "at most 65536 rows"),
    "bytes_ of a number": (
        lambda: frame_of(more={b"__npgeneric__": True, b"data": 2**33, b"dtype": "|S1"}),
        "cannot be 8589934592",
    ),
    "text of megabytes in an array": (
        lambda: frame_of(robot=np.array(["x" * 400_000])),
        "'robot' must be str, got array of <U400000",
    ),
    "texts that NumPy would pad": (
        lambda: frame_of(observation__state=["x" * 4000, *["y"] * 800]),
        "'observation/state' must be numbers",
    ),
    "key of megabytes": (lambda: msgpack.packb({"x" * (LIMIT - 20): 1}), "at most 4096"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_frame_is_refused_at_little_cost(name: str) -> None:
    make, reason = ATTACKS[name]
    frame = make()
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(BlmError, match=reason) as refused:
        read(frame)
    took, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(refused.value)) < 1200 and "\n" not in str(refused.value)
    assert peak < len(frame) + 2**20, f"{peak} bytes for a frame of {len(frame)}"
    assert took < 0.5  # measured: 2 ms; tracemalloc and a busy machine are slow


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running(EchoPolicy(), None) as address:
        yield address


@contextmanager
def opened(address: str) -> Iterator[ClientConnection]:
    with connect(f"ws://{address}", compression=None) as client:
        client.recv(timeout=10)
        yield client


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_peer_is_told_and_a_neighbour_keeps_its_pace(server: str, name: str) -> None:
    neighbour = RemotePolicy(f"ws://{server}")
    expected = EchoPolicy().act(observation()).actions
    frame = ATTACKS[name][0]()
    with opened(server) as bad:
        bad.send(frame)
        start = time.perf_counter()
        np.testing.assert_array_equal(neighbour.act(observation()).actions, expected)
        assert time.perf_counter() - start < 1
        told = bad.recv(timeout=10)
        assert isinstance(told, str) and len(told) < 1200 and "policy failed" not in told
        with pytest.raises(ConnectionClosed) as closed:
            bad.recv(timeout=10)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1011
    np.testing.assert_array_equal(neighbour.act(observation()).actions, expected)
    neighbour.close()


def test_the_largest_frame_follows_from_the_contract(server: str) -> None:
    large = PolicyContract(**{**vars(CONTRACT), "image_size": 512})
    assert LIMIT == 2 * 2**20 and wire.frame_limit(large) > 4 * 2 * 3 * 512**2
    with opened(server) as usual_mistake:  # pictures of a camera, not of the model: they are told the size
        usual_mistake.send(frame_of(observation__images__base=np.zeros((480, 640, 3), np.uint8)))
        assert "needed: uint8 (8, 8, 3)" in str(usual_mistake.recv(timeout=10))
    with opened(server) as bad:
        with pytest.raises(ConnectionClosed) as closed:
            bad.send(bytes(LIMIT + 1))
            bad.recv(timeout=10)
        # a server that has seen enough may cut the connection before the client has sent all
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1009


leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
nested = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text() | st.binary(), inner, max_size=5),
    max_leaves=40,
)


def count(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(1 + count(inner) for inner in value.values())
    return 1 + (sum(map(count, value)) if isinstance(value, list) else 0)


def depth(value: Any) -> int:
    """Levels of maps and lists that hold something."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return 1 + max(map(depth, inner)) if inner else 0


@MANY
@given(nested)
def test_the_scan_counts_what_msgpack_builds(value: Any) -> None:
    data, items = msgpack.packb(value), count(value)
    if depth(value) > MAX_DEPTH:
        with pytest.raises(BlmError, match="levels"):
            check_limits(data, items)
        return
    places = check_limits(data, items)
    with pytest.raises(BlmError, match="more than"):
        check_limits(data, items - 1)
    if isinstance(value, dict):
        found = [msgpack.packb(msgpack.unpackb(data[place])) for place in places]
        assert found == [msgpack.packb(part) for pair in value.items() for part in pair]
    else:
        assert places == []


truncated = st.tuples(nested.map(msgpack.packb), st.floats(0, 1)).map(lambda p: p[0][: int(p[1] * len(p[0]))])


@MANY
@given(st.binary(max_size=60) | truncated)
def test_the_scan_takes_nothing_that_msgpack_does_not(data: bytes) -> None:
    try:
        check_limits(data, 1000)
    except BlmError:
        return
    unpacker = msgpack.Unpacker(strict_map_key=False)
    unpacker.feed(data)
    unpacker.skip()
    assert unpacker.tell() == len(data)


@MANY
@given(st.binary(max_size=200), st.integers(0, 400), st.binary(max_size=8))
def test_a_damaged_frame_is_read_or_refused(tail: bytes, cut: int, patch: bytes) -> None:
    whole = frame_of(chunk=np.zeros((2, 8)), frozen=1, deadline_ms=50)
    frame = whole[: -cut or None] + tail
    frame = frame[:cut] + patch + frame[cut + len(patch) :]
    try:
        seen = read(frame)
        wire.deadline_s(wire.unpack(frame, ITEMS))
    except BlmError as error:
        assert len(str(error)) < 1200
        return
    assert CONTRACT.check(seen).state.shape == seen.state.shape


# --- what an array may be ---

BYTES = np.arange(8, dtype="<f4").tobytes()


@pytest.mark.parametrize(
    "sent",
    [
        array("<f4", [-8], BYTES),
        array("<f4", [2**62, 4], BYTES),
        array("<f4", [2**63, 2], BYTES),
        array("<f4", [7], BYTES),
        array("<f4", [9], BYTES),
        array("<f4", [True] * 3 + [8], BYTES),
        array("<f4", [8.0], BYTES),
        array("<f4", 8, BYTES),
        array("<f4", {"8": 8}, BYTES),
        array("<f4", [[8]], BYTES),
        array("<f4", None, BYTES),
        array("<f4", [1] * 33, BYTES[:4]),
        array("<f4", [8], 2**40),
        array("<f4", [8], "x" * 32),
        array("<f4", [8], list(BYTES)),
        array(b"<f4", [8], BYTES),
        array(["<f4"], [8], BYTES),
        array("f4", [8], BYTES),
        array("(8,)f4", [1], BYTES),
        array("<f4,<f4", [4], BYTES),
        array("|O", [4], BYTES),
        array("|V4", [8], BYTES),
        array("<c8", [4], BYTES),
        array("<M8[" + "s" * 4000 + "]", [4], BYTES),
        array("<f" + "4" * 4000, [8], BYTES),
        array("<U" + "9" * 9, [0]),
        array("<U0", [8]),
        array("|S0", [0]),
        {b"__ndarray__": True},
        {b"__npgeneric__": True, b"data": [1.0] * 8, b"dtype": "<f4"},
        {b"__npgeneric__": True, b"data": "1", b"dtype": "<f4"},
        {b"__npgeneric__": True, b"data": True, b"dtype": "<i4"},
        {b"__npgeneric__": True, b"data": 300, b"dtype": "|i1"},
        {b"__npgeneric__": True, b"data": 1, b"dtype": "<M8[s]"},
        {b"__npgeneric__": True, b"data": 1, b"dtype": "|O"},
        {b"__npgeneric__": True, b"data": {"x": 1}, b"dtype": "<U1"},
    ],
    ids=lambda sent: shorten(sent, 40),
)
def test_an_array_is_what_it_says_or_refused(sent: dict[bytes, Any]) -> None:
    for keys in (sent, {key.decode(): value for key, value in sent.items()}):
        with pytest.raises(BlmError) as refused:
            wire.unpack(msgpack.packb(request(observation__state=keys), default=wire._encode))
        assert len(str(refused.value)) < 500


STATE = observation().state


@pytest.mark.parametrize(
    "state",
    [
        STATE,
        STATE.astype(">f8"),
        STATE.tolist(),
        list(STATE),
        list(STATE.astype(">f2")),
        [0] * 8,
        np.arange(8),
    ],
    ids=repr,
)
def test_any_kind_of_number_is_a_state(state: Any) -> None:
    np.testing.assert_allclose(read(frame_of(observation__state=state)).state, np.asarray(state, np.float32))


@pytest.mark.parametrize(
    "changed",
    [
        {"observation__state": np.array(["1"] * 8)},
        {"observation__state": ["1"] * 8},
        {"observation__state": "12345678"},
        {"observation__state": [True] * 8},
        {"observation__state": np.ones(8, bool)},
        {"observation__state": np.zeros(8, "<M8[s]")},
        {"observation__state": [0.0] * 7 + [None]},
        {"observation__state": [[0.0]] * 8},
        {"observation__state": [2**64 - 1] * 7 + [-(2**63)] + [1]},
        {"observation__state": {"panda": 1}},
        {"observation__state": 1.0},
        {"observation__state": np.float32(1)},
        {"observation__state": np.array(1.0)},
        {"observation__state": np.zeros((8, 1))},
        {"observation__state": np.full(8, np.inf)},
        {"observation__state": [float("nan")] * 8},
        {"observation__images__base": np.zeros((8, 8, 3), np.float32)},
        {"observation__images__base": np.zeros((8, 8, 3), np.int64)},
        {"observation__images__base": np.zeros((8, 8, 3), bool)},
        {"observation__images__base": np.zeros((8, 8, 3), "|S1")},
        {"observation__images__base": np.zeros((3, 8, 8), np.uint8)},
        {"observation__images__base": np.array(0, np.uint8)},
        {"observation__images__base": np.zeros((8, 8, 3), np.uint8).tolist()},
        {"observation__images__base": bytes(192)},
        {"prompt": b"push the cube"},
        {"prompt": ["push"]},
        {"prompt": np.array("push")},
        {"robot": ["panda"]},
        {"robot": {"panda": 1}},
        {"robot": np.array("panda")},
        {"robot": ""},
        {"seed": 2**63},
        {"seed": -1},
        {"seed": True},
        {"seed": 1.0},
        {"seed": None},
        {"seed": np.array([1])},
        {"frozen": 1},
        {"frozen": 2**62},
        {"chunk": np.zeros((2, 8)), "frozen": 3},
        {"chunk": np.zeros((2, 8)), "frozen": -1},
        {"chunk": np.zeros((5, 8))},
        {"chunk": np.zeros((2, 7))},
        {"chunk": [[0.0] * 8, [0.0] * 7]},
        {"chunk": [["0"] * 8]},
        {"chunk": [[True] * 8]},
        {"chunk": np.full((1, 8), np.nan)},
        {"chunk": np.zeros((0, 0, 0))},
    ],
    ids=lambda changed: shorten(changed, 70),
)
def test_invalid_observations_are_refused_by_key(changed: dict[str, Any]) -> None:
    with pytest.raises(BlmError) as refused:
        read(frame_of(**changed))
    assert len(str(refused.value)) < 900
    assert any(word in str(refused.value) for name in changed for word in name.split("__"))


@pytest.mark.parametrize(
    "value",
    [0, -1, float("nan"), -float("inf"), True, "50", None, [50], {}, b"50", np.array([50.0])],
    ids=repr,
)
def test_a_deadline_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ContractError, match="'deadline_ms' must be a positive number of milliseconds"):
        wire.deadline_s(wire.unpack(frame_of(deadline_ms=value)))


@pytest.mark.parametrize(
    "value", [1, 0.5, 2**64 - 1, 1e308, float("inf"), np.float32(50), np.int64(50)], ids=repr
)
def test_any_positive_deadline_is_taken(value: Any) -> None:
    assert wire.deadline_s(wire.unpack(frame_of(deadline_ms=value))) == pytest.approx(float(value) / 1000)


def test_a_seed_of_numpy_and_the_largest_are_taken() -> None:
    assert read(frame_of(seed=np.int64(7))).seed == 7
    assert read(frame_of(seed=2**63 - 1)).seed == 2**63 - 1


def test_unknown_keys_are_ignored_and_the_last_duplicate_counts() -> None:
    assert read(frame_of(more={"nested": [1, {"x": b"y" * 10_000}]}, **{"": None})).seed == 3
    data = frame_of(seed=1)
    twice = bytes([data[0] + 1]) + data[1:] + msgpack.packb("seed") + msgpack.packb(2)
    assert read(twice).seed == 2
    for key in (1, None, 1.5, ("a",), {"a": 1}.keys() and b"prompt"):
        odd = bytes([data[0] + 1]) + data[1:] + msgpack.packb(key) + msgpack.packb(2)
        try:
            assert read(odd).seed == 1  # bytes are read as a key of another
        except BlmError as error:
            assert "not a valid msgpack message" in str(error)


def test_right_messages_are_those_of_openpi_client_byte_for_byte() -> None:
    full = request(chunk=np.zeros((2, 8), np.float32), frozen=1, deadline_ms=50.0)
    assert wire.pack(full) == msgpack_numpy.packb(full)
    seen = read(msgpack_numpy.packb(full))
    again = wire.to_request(seen)
    assert wire.pack({**again, "deadline_ms": 50.0}) == msgpack_numpy.packb(full)


dtypes = st.sampled_from(["|u1", "<f4", ">f8", "<f2", "<i8", ">i2", "|b1", "<U3", "|S2", "<M8[s]"])
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@MANY
@given(dtypes, shapes, st.integers(0, 2**32 - 1))
def test_every_array_of_openpi_client_is_read_as_it_is(dtype: str, shape: tuple[int, ...], seed: int) -> None:
    sent = np.random.default_rng(seed).integers(0, 2, shape).astype(dtype)
    scalars = [] if sent.dtype.kind == "M" else list(sent.ravel()[:2])  # dates neither codec can send
    got = wire.unpack(msgpack_numpy.packb({"a": sent, "scalars": scalars}))
    assert got["scalars"] == scalars
    assert got["a"].dtype == sent.dtype and got["a"].shape == sent.shape and (got["a"] == sent).all()
    assert wire.pack(got["a"]) == msgpack_numpy.packb(sent)


# --- names and other values in errors ---


def test_a_long_unknown_name_costs_little_and_is_shortened() -> None:
    registry = {"panda": 1, "xarm6": 2}
    start = time.perf_counter()
    with pytest.raises(UnknownNameError, match="Valid: panda, xarm6") as refused:
        lookup("robot", "panda " * 1_400_000, registry)
    assert time.perf_counter() - start < 0.1
    assert len(str(refused.value)) < 300 and "8400000 long" in str(refused.value)
    again = pickle.loads(pickle.dumps(refused.value))
    assert isinstance(again, UnknownNameError) and len(str(again)) < 300
    with pytest.raises(UnknownNameError, match="Did you mean 'panda'"):
        lookup("robot", "pamda", registry)


@MANY
@given(nested | st.text(min_size=200) | st.binary(min_size=200) | st.text().map(ValueError))
def test_quoted_values_in_errors_are_one_short_line(value: Any) -> None:
    text = shorten(value)
    assert len(text) < 220 and text.isprintable()


def test_an_instruction_is_bounded_for_every_caller() -> None:
    at_most = Observation(**{**vars(observation()), "instruction": "x" * MAX_INSTRUCTION})
    assert CONTRACT.check(at_most).instruction == at_most.instruction
    with pytest.raises(ContractError, match=r"401 long.*at most 400 bytes"):
        CONTRACT.check(Observation(**{**vars(at_most), "instruction": "x" * (MAX_INSTRUCTION + 1)}))


# --- what else a peer may do with a socket ---


@pytest.mark.parametrize(("frame", "told"), [("hello", "a text frame"), (b"", "an empty frame")])
def test_frames_that_are_no_messages_are_told_so(server: str, frame: str | bytes, told: str) -> None:
    with opened(server) as bad:
        bad.send(frame)
        assert told in str(bad.recv(timeout=10))
        with pytest.raises(ConnectionClosed):
            bad.recv(timeout=10)


def test_frames_sent_ahead_are_answered_in_order(server: str) -> None:
    seen = [observation(seed=seed) for seed in range(20)]
    with opened(server) as eager:
        for one in seen:
            eager.send(wire.pack(wire.to_request(one)))
        for one in seen:
            got = wire.unpack(eager.recv(timeout=10))["actions"]
            np.testing.assert_array_equal(got, EchoPolicy().act(one).actions)


def test_the_request_of_a_disconnected_client_is_cancelled() -> None:
    policy = BatchEcho()
    app = create_app(policy, scheduler_limits=SchedulerLimits(max_action_batch=1))
    with running_app(app) as address, opened(address) as first:
        first.send(frame_of())
        time.sleep(0.2)  # its observation is in work now: what follows waits
        for _ in range(3):
            with opened(address) as gone:
                gone.send(frame_of(seed=9))
                wait_for(lambda: app.state.scheduler.waiting["actions"] > 0)
        time.sleep(0.2)
        policy.go.set()
        assert "actions" in wire.unpack(first.recv(timeout=10))
        first.send(frame_of())
        assert "actions" in wire.unpack(first.recv(timeout=10))
    assert policy.sizes == [1, 1]


def handshaken(address: str) -> socket.socket:
    """A websocket without a library, after the contract has come."""
    host, _, port = address.partition(":")
    raw = socket.create_connection((host, int(port)), timeout=10)
    raw.sendall(
        f"GET / HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
    )
    assert b"101" in raw.recv(4096)
    return raw


def masked(first: int, data: bytes = b"") -> bytes:
    return struct.pack("!BB", first, 0x80 | len(data)) + bytes(4) + data


def test_fragments_without_end_close_the_connection(server: str) -> None:
    with handshaken(server) as raw:
        raw.sendall(masked(0x02) + masked(0x00) * (MAX_FRAGMENTS - 2) + masked(0x80, frame_of()[:100]))
        assert b"truncated" in read_all(raw)  # as many as are allowed make a message
    with handshaken(server) as raw:
        raw.sendall(masked(0x02) + masked(0x00) * (MAX_FRAGMENTS + 5))
        assert b"a message has more than 1024 fragments" in read_all(raw)


def read_all(raw: socket.socket) -> bytes:
    """Until the server closes the connection."""
    got = b""
    while part := raw.recv(4096):
        got += part
        if b"the message" in got or b"lacks" in got:
            break  # an error of a request waits for our half of the closing handshake
    return got


def test_a_flood_of_pings_closes_the_connection(server: str) -> None:
    with handshaken(server) as peer, pytest.raises(ConnectionError):
        for _ in range(100):
            peer.sendall(masked(0x89, bytes(125)) * 1000)
    with opened(server) as neighbour:
        for _ in range(50):
            neighbour.ping()
        neighbour.send(frame_of())
        assert "actions" in wire.unpack(neighbour.recv(timeout=10))


def test_a_flood_of_small_messages_closes_the_connection(server: str) -> None:
    with handshaken(server) as peer:
        with suppress(ConnectionError):
            peer.sendall(masked(0x82, b"\x80") * 200_000)
        with suppress(ConnectionError):
            assert b"lacks" in read_all(peer)
    with opened(server) as neighbour:
        neighbour.send(frame_of())
        assert "actions" in wire.unpack(neighbour.recv(timeout=10))
