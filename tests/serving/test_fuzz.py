"""Nonsense on the wire and in chat requests: refused by name or served, never a crash, a hang or a leak."""

from __future__ import annotations

import base64
import json
import os
import resource

import httpx
import msgpack
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance
from websockets.sync.client import connect

from blm.serving.errors import MESSAGE_CHARACTERS, RequestError
from blm.serving.protocols.openai.conversation import ChatLimits, parse_request
from blm.serving.protocols.openai.schema import DEFAULTS, IGNORED, ChatCompletionRequest
from blm.serving.protocols.openpi import wire
from blm.types import BlmError
from tests.support.serving import CONTRACT, JSON, EchoGenerator, EchoPolicy, observation, running

MANY = int(os.environ.get("BLM_FUZZ", "300"))
"""Inputs for each test; the slow runs take 10,000."""
QUICK = settings(max_examples=MANY, deadline=None, suppress_health_check=list(HealthCheck))

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.binary(), inner, max_size=4),
    max_leaves=12,
)
dtypes = (
    st.sampled_from(["<f4", "|u1", "<i8", "|O", "<U4", "<M8[s]", "f4,f4", "(3", "<f999", "|V8", ""])
    | st.text()
)
texts = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
jsons = st.recursive(
    texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
arrays = st.fixed_dictionaries(
    {
        "__ndarray__": st.booleans(),
        "data": st.binary(max_size=64) | st.integers(-(2**63), 2**64 - 1),
        "dtype": dtypes | values,
        "shape": st.lists(st.integers(-(2**31), 2**31), max_size=4) | values,
    }
).map(lambda found: {key.encode(): value for key, value in found.items()})
KEYS = (*wire.to_request(observation()), wire.CHUNK, wire.FROZEN, wire.DEADLINE, "more")
requests = st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, values | arrays))


@QUICK
@given(st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    try:
        wire.to_observation(wire.unpack(data), CONTRACT)
    except BlmError as error:
        assert str(error)


@QUICK
@given(requests)
def test_any_request_of_ours_with_anything_in_it(request: dict[str, object]) -> None:
    whole = {**wire.to_request(observation()), **request}
    try:
        got = wire.unpack(msgpack.packb(whole, default=wire._encode))
        wire.deadline_s(got)
        wire.to_observation(got, CONTRACT)
    except BlmError as error:
        assert str(error)


def test_a_ragged_picture_is_refused() -> None:
    with pytest.raises(BlmError, match="'observation/images/base' must be an array of uint8"):
        wire.to_observation(
            {**wire.to_request(observation()), "observation/images/base": [None, []]}, CONTRACT
        )


def test_a_number_beyond_float32_is_refused_by_the_joint_that_has_it() -> None:
    state = [0.0] * (CONTRACT.action_spaces["panda"].dim - 1)
    with pytest.raises(BlmError, match="gripper"):
        wire.to_observation(
            {**wire.to_request(observation()), "observation/state": [*state, 1e300]}, CONTRACT
        )


ONE_PIXEL = base64.b64encode(
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\0\0\0\0:~\x9bU"
    b"\0\0\0\nIDATx\x9cc`\0\0\0\x02\0\x01H\xaf\xa4q\0\0\0\0IEND\xaeB`\x82"
).decode()
heads = st.sampled_from(
    ["data:image/png;base64,", "data:image;base64,", "DATA:image/jpg;a=b;base64,", "data:,", "http://a/"]
)
coded = (
    st.just(ONE_PIXEL)
    | st.binary(max_size=80).map(lambda b: b.hex())
    | st.binary(max_size=40).map(lambda b: base64.b64encode(base64.b64decode(ONE_PIXEL)[:-20] + b).decode())
    | st.text(max_size=20).map(lambda text: ONE_PIXEL[:40] + text + ONE_PIXEL[40:])
)
pictures = st.text() | st.builds("".join, st.tuples(heads, coded))
PARTS = ["text", "input_text", "output_text", "refusal", "image_url", "input_image", "video_url", "file"]
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(PARTS) | jsons},
    optional={
        "text": st.text() | jsons,
        "refusal": st.text() | jsons,
        "image_url": pictures | st.fixed_dictionaries({"url": pictures, "detail": jsons}) | jsons,
    },
)
functions = st.fixed_dictionaries({}, optional={"name": st.text() | jsons, "arguments": st.text() | jsons})
calls = st.fixed_dictionaries(
    {}, optional={"id": st.text() | jsons, "type": jsons, "function": functions | jsons}
)
ROLES = ["system", "user", "assistant", "developer", "tool", "function"]
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES) | st.text()},
    optional={
        "content": st.text() | st.lists(parts, max_size=3) | jsons,
        "name": st.text() | jsons,
        "tool_calls": st.lists(calls, max_size=3) | jsons,
        "tool_call_id": st.text() | jsons,
        "function_call": functions | jsons,
        "reasoning_content": jsons,
    },
)
CHAT_FIELDS = (*ChatCompletionRequest.model_fields, *DEFAULTS, *IGNORED)
given_fields = st.dictionaries(
    st.sampled_from(CHAT_FIELDS) | st.text(max_size=12), st.none() | st.integers(-3, 10) | jsons, max_size=4
)
chats = st.builds(
    lambda fields, model, messages: {**fields, "model": model, "messages": messages},
    given_fields,
    st.just("BLM") | jsons,
    st.lists(turns, max_size=3) | jsons,
)


def to_body(chat: object) -> bytes:
    return json.dumps(chat).encode()


@QUICK
@given(chats.map(to_body) | st.binary(max_size=300))
def test_any_chat_request(body: bytes) -> None:
    try:
        parsed = parse_request(body, ChatLimits())
        assert parsed.request.samplings(4096)
        parsed.conversation.decoded()
    except RequestError as error:
        assert error.status == 400 and 0 < len(str(error)) <= MESSAGE_CHARACTERS and str(error).isprintable()


@settings(max_examples=max(50, MANY // 4), deadline=None, suppress_health_check=list(HealthCheck))
@given(chats.map(to_body) | st.binary(max_size=300))
def test_a_server_never_says_500(live: str, body: bytes) -> None:
    reply = httpx.post(f"http://{live}/v1/chat/completions", content=body, headers=JSON, timeout=20)
    assert reply.status_code < 500, reply.text
    if reply.status_code >= 400:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


@settings(max_examples=max(50, MANY // 4), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_every_route_keeps_the_openapi_document(live: str, operations: list, data: st.DataObject) -> None:
    case = data.draw(data.draw(st.sampled_from(operations)).as_strategy())
    # No schema can say which base64 is a picture, or which model is served: 400 and 404 are right there.
    case.call_and_validate(base_url=f"http://{live}", excluded_checks=[positive_data_acceptance])


@pytest.fixture(scope="module")
def operations(live: str) -> list:
    schema = schemathesis.openapi.from_url(f"http://{live}/openapi.json")
    found = [one.ok() for one in schema.get_all_operations()]
    assert {"/v1/chat/completions", "/v1/models", "/health"} <= {one.path for one in found}
    return found


@settings(max_examples=max(50, MANY // 4), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200) | requests.map(lambda r: msgpack.packb(r, default=wire._encode)))
def test_a_websocket_reports_errors_and_others_continue(live: str, frame: bytes) -> None:
    with connect(f"ws://{live}", compression=None) as socket:
        socket.recv(timeout=10)
        socket.send(frame)
        said = socket.recv(timeout=10)
        assert isinstance(said, str) and said and "the policy failed" not in said


@pytest.fixture(scope="module")
def live():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with running(EchoPolicy(), EchoGenerator()) as address:
        yield address
        assert httpx.get(f"http://{address}/health").status_code == 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_bombs_are_refused_before_they_are_unpacked() -> None:
    huge = {b"__ndarray__": True, b"data": b"", b"dtype": "|u1", b"shape": [2**20, 2**20]}
    nested: object = 1
    for _ in range(2000):
        nested = [nested]
    for bomb in (msgpack.packb({"a": huge}), b"\x91" * 100_000 + b"\x00", b"\xdd\xff\xff\xff\xff"):
        with pytest.raises(BlmError):
            wire.unpack(bomb)
    big = np.zeros((4096, 4096, 3), np.uint8)
    with pytest.raises(BlmError, match="needed"):
        wire.to_observation({**wire.to_request(observation()), "observation/images/base": big}, CONTRACT)
