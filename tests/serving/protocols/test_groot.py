"""GR00T clients: their codec, their observations, the same actions as ours, and what they may not do."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from blm.serving.app import create_app
from blm.serving.protocols.groot.codec import pack, to_observations, unpack
from blm.serving.protocols.groot.server import add_groot
from blm.types import BlmError
from tests.support.groot import Client, batch, running
from tests.support.serving import CONTRACT, SIDE, EchoPolicy, observation


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running(EchoPolicy()) as found:
        yield found


@pytest.fixture
def client(port: int) -> Iterator[Client]:
    client = Client(port)
    yield client
    client.close()


@pytest.mark.parametrize("robot", ["panda", "xarm6"])
def test_a_client_gets_the_actions_of_the_policy(client, robot):
    seen = [observation(robot, 3), observation(robot, 3)]
    actions, info = client.call("get_action", batch(*seen))
    for row, one in enumerate(seen):
        expected = EchoPolicy().act(one).actions
        found = np.concatenate([actions["arm"][row], actions["gripper"][row]], axis=-1)
        np.testing.assert_array_equal(found, expected)
    assert actions["gripper"].shape == (2, 4, 1) and info["revision"] == "echo" and info["infer_ms"] >= 0


@pytest.mark.parametrize("grippers", [(0,), (3, 7), ()])
def test_grippers_are_where_the_action_space_has_them(grippers):
    """A gripper that comes first, a bimanual arm, and an arm without a gripper."""
    kinds = tuple("gripper" if place in grippers else "absolute_joint_position" for place in range(8))
    space = replace(CONTRACT.action_spaces["panda"], kind="per_dimension", kinds=kinds)
    policy = EchoPolicy(replace(CONTRACT, action_spaces={"panda": space}))
    seen, others = observation("panda", 3), [place for place in range(8) if place not in grippers]
    with running(policy) as port:
        client = Client(port)
        parts = {"arm": others, "gripper": list(grippers)} if grippers else {"arm": others}
        request = batch(seen)
        state = seen.state[None, None].repeat(2, axis=1)
        request["observation"]["state"] = {part: state[..., places] for part, places in parts.items()}
        actions, _ = client.call("get_action", request)
        assert client.call("get_modality_config")["state"]["as_json"]["modality_keys"] == list(parts)
        client.close()
    expected = policy.act(seen).actions
    assert actions.keys() == parts.keys()
    for part, places in parts.items():
        np.testing.assert_array_equal(actions[part][0], expected[:, places])


def test_the_other_endpoints(client):
    assert client.call("ping")["status"] == "ok"
    assert client.call("reset", {"options": None}) == {}
    found = client.call("get_modality_config")
    assert found["video"]["as_json"] == {"delta_indices": [0], "modality_keys": ["base", "wrist"]}
    assert found["action"]["as_json"]["delta_indices"] == [0, 1, 2, 3]


def without(data: dict[str, Any], *path: str) -> dict[str, Any]:
    if len(path) == 1:
        return {key: value for key, value in data.items() if key != path[0]}
    return {**data, path[0]: without(data[path[0]], *path[1:])}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (without(batch(observation()), "observation", "video", "wrist"), "lacks 'wrist'"),
        (without(batch(observation()), "observation", "state", "gripper"), "lacks 'gripper'"),
        (without(batch(observation()), "options", "robot"), "robot"),
        (batch(observation(size=SIDE + 1)), "image"),
        ({**batch(observation()), "options": {"robot": "arm"}}, "arm"),
        ({**batch(observation()), "options": [1]}, "'options' must be a map, got list"),
        ({**batch(observation()), "options": {"robot": "panda", "deadline_ms": -1}}, "deadline_ms"),
        (None, "observation"),
        ([1], "observation"),
    ],
)
def test_errors_are_reported_and_the_connection_stays(client, data, said):
    assert said in client.call("get_action", data)["error"]
    assert client.call("ping")["status"] == "ok"


def test_a_client_cannot_end_the_server(client):
    assert "unknown endpoint 'kill'" in client.call("kill")["error"]
    assert client.call("ping")["status"] == "ok"


def test_a_failing_policy_is_told(client):
    data = batch(observation())
    data["observation"]["language"]["annotation.human.task_description"] = [["break"]]
    assert "the weights are gone" in client.call("get_action", data)["error"]
    assert client.call("ping")["status"] == "ok"


@pytest.mark.parametrize(("token", "fine"), [("secret", True), ("wrong", False), (None, False)])
def test_the_key_is_required(token, fine):
    with running(EchoPolicy(), api_key="secret") as port:
        client = Client(port, token)
        assert ("status" in client.call("ping")) == fine
        client.close()


def bomb(shape: tuple[int, ...], descr: str = "<f8") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return msgpack.packb({"data": {"__ndarray_class__": True, "as_npy": out.getvalue()}})


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xc1",
        msgpack.packb([1, 2]),
        msgpack.packb({"endpoint": ["a"]}),
        msgpack.packb({"data": {"__ndarray_class__": True, "as_npy": b"no array"}}),
        msgpack.packb({"data": {"__ndarray_class__": True}}),
        bomb((1 << 40,)),
        bomb((1,), "|O"),
    ],
)
def test_malformed_messages_get_an_error(client, message):
    assert "error" in client.send(message)
    assert client.call("ping")["status"] == "ok"


def test_messages_that_are_not_from_req_sockets_are_ignored(port, client):
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 1000)
    dealer.connect(f"tcp://127.0.0.1:{port}")
    for frames in ([b"one"], [b"a", b"b", b"c"], [b"", b"x", b"y"]):
        dealer.send_multipart(frames)
    dealer.close()
    context.term()
    assert client.call("ping")["status"] == "ok"


def test_a_taken_port_is_named():
    with running(EchoPolicy()) as port:
        app = create_app(EchoPolicy())
        add_groot(app, EchoPolicy(), port=port)

        async def start() -> None:
            async with app.router.lifespan_context(app):
                pass

        import asyncio

        with pytest.raises(BlmError, match=f"127.0.0.1:{port}"):
            asyncio.run(start())


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
        max_leaves=12,
    )
)
def test_arbitrary_messages_are_read_or_refused(value):
    try:
        to_observations(unpack(pack(value)), CONTRACT)
    except BlmError:
        return
    raise AssertionError("nothing of this is an observation")
