"""Serving: the wire against openpi-client, the app against the real openai and OpenPI clients, faults."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, suppress

import httpx
import numpy as np
import openai
import pytest
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from PIL import Image as Pillow
from PIL.ExifTags import Base
from prometheus_client.parser import text_string_to_metric_families

from blm.serving.access import connections
from blm.serving.app import create_app
from blm.serving.client import RemotePolicy
from blm.serving.protocols.openai.conversation import ChatLimits
from blm.serving.protocols.openai.reply import VisibleText
from blm.serving.protocols.openpi import wire
from blm.serving.scheduler import ActionResult, BusyError, ModelScheduler, SchedulerLimits
from blm.types import (
    ActionChunk,
    BlmError,
    ContractError,
    LateError,
    Message,
    Observation,
    Policy,
    PolicyContract,
    Sampling,
)
from tests.support.serving import (
    CONTRACT,
    JSON,
    PNG,
    BatchEcho,
    EchoGenerator,
    EchoPolicy,
    EndlessGenerator,
    ask,
    body,
    connected,
    foreign_openpi_server,
    observation,
    picture,
    png,
    running,
    running_app,
    space,
    wait_for,
)

uses_openpi_client = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager")
"""openpi-client 0.1.2 calls websockets in a way that websockets 17.1 calls deprecated; ours must not."""


# --- the wire ---

DTYPES = ["<f4", ">f8", "<f2", "|u1", "<i8", "|b1", "<U5", "|S3", "<M8[s]", ">i2"]


def test_codec_equals_openpi_client_both_ways() -> None:
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        for shape in [(), (0,), (3,), (2, 3), (1, 0, 2), (2, 2, 2, 2)]:
            array = rng.integers(0, 2, shape).astype(dtype)
            nested = {"list": [array, 1, "x", None]}
            message = {"a": array, "nested": nested, "strided": np.repeat(array, 2)[::2]}
            packed = wire.pack(message)
            assert packed == msgpack_numpy.packb(message)
            for decode in (wire.unpack, msgpack_numpy.unpackb):
                got = decode(packed)["nested"]["list"][0]
                assert got.dtype == array.dtype and got.shape == array.shape and (got == array).all()
    for scalar in (np.float32(1.5), np.float64(2.5), np.int8(-3), np.bool_(True), np.str_("a")):
        packed = wire.pack({"s": scalar})
        assert packed == msgpack_numpy.packb({"s": scalar})
        assert wire.unpack(packed)["s"] == msgpack_numpy.unpackb(packed)["s"] == scalar


def test_codec_reads_text_keys_and_refuses_what_it_must() -> None:
    array = np.arange(3, dtype=np.float32)
    text_keys = {"__ndarray__": True, "data": array.tobytes(), "dtype": "<f4", "shape": [3]}
    assert (wire.unpack(wire.pack({"a": text_keys}))["a"] == array).all()
    for bad in (np.array([object()]), np.array([1j]), np.zeros(1, "f4,i4"), np.complex64(1)):
        with pytest.raises(BlmError, match="cannot be sent"):
            wire.pack({"a": bad})
    for dtype in ("|O", "<c8", "|V4", "f4,f4"):
        with pytest.raises(BlmError):
            wire.unpack(wire.pack({**text_keys, "dtype": dtype}))


def test_malformed_frames_are_refused_not_crashed_on() -> None:
    whole = wire.pack(wire.to_request(observation()))
    rng = np.random.default_rng(1)
    for _ in range(300):
        frame = bytearray(whole[: rng.integers(0, len(whole) + 1)])
        for _ in range(rng.integers(0, 4)):
            if frame:
                frame[rng.integers(0, len(frame))] = rng.integers(0, 256)
        with suppress(BlmError):
            wire.to_observation(wire.unpack(bytes(frame)), CONTRACT)
    for dtype in ("nonsense", "(1", "f4,(", ["f4"], None, b"<f4", "<U99999999999"):
        fields = {b"__ndarray__": True, b"data": b"abcd", b"dtype": dtype, b"shape": [-1, 2**62]}
        with pytest.raises(BlmError):
            wire.unpack(wire.pack(fields))


def test_request_round_trip_and_openpi_image_names() -> None:
    seen = observation("xarm6")
    back = wire.to_observation(wire.to_request(seen), CONTRACT)
    assert back.robot == "xarm6" and back.seed == 3 and back.instruction == seen.instruction
    assert (back.state == seen.state).all()
    request = {
        "observation/image": seen.images["base"],
        "observation/wrist_image": seen.images["wrist"],
        "observation/state": seen.state.astype(np.float64),
        "prompt": "push",
        "robot": "xarm6",
    }
    back = wire.to_observation(request, CONTRACT)
    assert back.seed == 0 and all((back.images[name] == seen.images[name]).all() for name in CONTRACT.cameras)


def test_robot_may_be_left_out_when_there_is_one() -> None:
    request = wire.to_request(observation("xarm6"))
    del request["robot"]
    with pytest.raises(ContractError, match=r"'robot'.*panda, xarm6"):
        wire.to_observation(request, CONTRACT)
    one = PolicyContract(**{**vars(CONTRACT), "action_spaces": {"xarm6": space("xarm6", 7)}})
    assert wire.to_observation(request, one).robot == "xarm6"


BROKEN = {
    "state shape": ({"observation/state": np.zeros(5, np.float32)}, r"\(5,\).*'panda' needs \(8,\)"),
    "state words": ({"observation/state": "home"}, "'observation/state' must be numbers, got 'home'"),
    "state nan": ({"observation/state": np.full(8, np.nan)}, "not finite"),
    "unknown robot": ({"robot": "pandas"}, "unknown robot 'pandas'.*'panda'"),
    "image size": ({"observation/images/base": np.zeros((3, 3, 3), np.uint8)}, "'base'.*needed: uint8"),
    "image type": ({"observation/images/wrist": np.zeros((8, 8, 3))}, "camera 'wrist': image is float64"),
    "no camera": ({"observation/images/wrist": None}, "observation/images/wrist.*observation/wrist_image"),
    "no prompt": ({"prompt": None}, "lacks 'prompt'; accepted"),
    "prompt type": ({"prompt": 3}, "'prompt' must be str"),
    "seed": ({"seed": -1}, "'seed' must be >= 0"),
}


@uses_openpi_client
@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN)
def test_a_bad_observation_is_refused_and_others_are_served(server: str, change: dict, message: str) -> None:
    neighbour = RemotePolicy(f"ws://{server}")
    before = neighbour.act(observation()).actions
    bad = WebsocketClientPolicy(f"ws://{server}")
    with pytest.raises(RuntimeError, match=message):
        request = {**wire.to_request(observation()), **change}
        bad.infer({key: value for key, value in request.items() if value is not None})
    assert (neighbour.act(observation()).actions == before).all()
    bad._ws.close()
    neighbour.close()


# --- actions over the socket ---


@uses_openpi_client
@pytest.mark.parametrize("path", ["", "/v1/realtime/robot/openpi"])
def test_openpi_client_gets_metadata_and_actions(server: str, path: str) -> None:
    remote = WebsocketClientPolicy(f"ws://{server}{path}")
    assert PolicyContract.from_json(remote.get_server_metadata()) == CONTRACT
    for seed in (0, 1):
        seen = observation(seed=seed)
        reply = remote.infer(wire.to_request(seen))
        assert (reply["actions"] == EchoPolicy().act(seen).actions).all()
        assert reply["server_timing"]["infer_ms"] >= reply["policy_timing"]["infer_ms"] > 0
        assert ("prev_total_ms" in reply["server_timing"]) == (seed == 1)
    remote._ws.close()


def test_remote_policy_equals_the_local_one(server: str) -> None:
    remote, local = RemotePolicy(f"ws://{server}"), EchoPolicy()
    assert isinstance(remote, Policy) and remote.contract == local.contract
    remote.reset()
    for robot in CONTRACT.action_spaces:
        seen = observation(robot)
        assert (remote.act(seen).actions == local.act(seen).actions).all()
    with pytest.raises(ContractError, match=r"image is uint8 \(5, 5, 3\)"):
        remote.act(observation(size=5))
    remote.act(observation())  # a refusal on our side leaves the connection open
    remote.close()
    with pytest.raises(BlmError, match="closed"):
        remote.act(observation())


def test_a_failing_policy_is_reported_and_the_server_continues(server: str) -> None:
    remote = RemotePolicy(f"ws://{server}")
    seen = Observation(**{**vars(observation()), "instruction": "break"})
    with pytest.raises(BlmError, match=r"reports: the policy failed.*the weights are gone"):
        remote.act(seen)
    with pytest.raises(BlmError, match="reconnect"):
        remote.act(observation())
    again = RemotePolicy(f"ws://{server}")
    assert again.act(observation()).actions.shape == (4, 8)
    again.close()


def test_no_server_and_slow_server_raise_blm_errors() -> None:
    with pytest.raises(BlmError, match=r"no policy server at ws://127.0.0.1:9"):
        RemotePolicy("ws://127.0.0.1:9", timeout_s=2)

    class SlowPolicy(EchoPolicy):
        def act(self, observation: Observation) -> ActionChunk:
            time.sleep(1.5)
            return super().act(observation)

    with running(SlowPolicy(), None) as address:
        remote = RemotePolicy(f"ws://{address}", timeout_s=0.5)
        with pytest.raises(BlmError, match=r"no reply .* within 0.5 s"):
            remote.act(observation())


def test_a_server_without_our_contract_is_driven_when_the_user_states_it() -> None:
    seen: list[dict] = []
    with foreign_openpi_server(seen) as address:
        with pytest.raises(ContractError, match=r"sends no policy contract .*; pass RemotePolicy"):
            RemotePolicy(f"ws://{address}")
        remote = RemotePolicy(f"ws://{address}", contract=EchoPolicy().contract)
        chunk = remote.act(observation())
        remote.close()
    np.testing.assert_allclose(chunk.actions, np.tile(observation().state, (4, 1)))
    assert "observation/image" in seen[0] and seen[0]["prompt"] == observation().instruction


def test_client_imports_no_torch() -> None:
    code = "import sys, blm.serving.client as c; print({'torch', 'fastapi', 'mujoco'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@uses_openpi_client
def test_api_key_guards_both_spaces() -> None:
    with running(EchoPolicy(), EchoGenerator(), api_key="sesame") as address:
        with pytest.raises(BlmError, match=r"401.*api_key"):
            RemotePolicy(f"ws://{address}")
        RemotePolicy(f"ws://{address}", api_key="sesame").close()
        WebsocketClientPolicy(f"ws://{address}", api_key="sesame")._ws.close()
        with openai.OpenAI(base_url=f"http://{address}/v1", api_key="wrong", max_retries=0) as client:
            for call in (lambda: ask(client, "hi"), client.models.list):
                with pytest.raises(openai.AuthenticationError):
                    call()
        with openai.OpenAI(base_url=f"http://{address}/v1", api_key="sesame") as client:
            assert ask(client, "hi").choices[0].message.content == "user: hi"
        assert httpx.get(f"http://{address}/health").status_code == 200


# --- chat ---


def test_status_routes(server: str, client: openai.OpenAI) -> None:
    assert httpx.get(f"http://{server}/healthz").text == "OK\n"
    about = httpx.get(f"http://{server}/version").json()
    assert about["chat"] and PolicyContract.from_json(about["policy"]) == CONTRACT
    assert [model.id for model in client.models.list()] == ["BLM"]
    missing = httpx.get(f"http://{server}/v1/nothing")
    assert missing.status_code == 404 and "/v1/nothing" in missing.json()["error"]["message"]


def test_chat_with_text_and_pictures(client: openai.OpenAI) -> None:
    done = ask(client, "how many cubes", top_p=0.9)
    assert done.choices[0].message.content == "user: how many cubes"
    assert done.choices[0].finish_reason == "stop" and done.object == "chat.completion"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (3, 4, 7)
    for head in (PNG, "data:image;base64,"):
        parts = [*picture(head + png((200, 10, 30)), detail="auto"), {"type": "text", "text": "colour?"}]
        assert ask(client, parts).choices[0].message.content == "user: colour? (200, 10, 30)"


def test_pictures_are_turned_as_their_exif_says(client: openai.OpenAI) -> None:
    turned, exif = io.BytesIO(), Pillow.Exif()
    exif[Base.Orientation] = 3  # by 180 degrees
    Pillow.fromarray(np.array([[[255] * 3, [0] * 3]], np.uint8)).save(turned, "PNG", exif=exif)
    content = picture(PNG + base64.b64encode(turned.getvalue()).decode())
    assert "(0, 0, 0)" in ask(client, content).choices[0].message.content


def test_chat_stops_and_limits(client: openai.OpenAI) -> None:
    assert ask(client, "one two three", stop=["two", "three"]).choices[0].message.content == "user: one "
    assert ask(client, "a b c d", max_tokens=2).choices[0].finish_reason == "length"
    assert ask(client, "a b c d", max_completion_tokens=9).choices[0].finish_reason == "stop"


def test_chat_streams(client: openai.OpenAI) -> None:
    chunks = list(ask(client, "stream this", stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "user: stream this"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 5
    assert all(chunk.usage is None for chunk in ask(client, "no usage", stream=True))
    assert len({chunk.id for chunk in chunks}) == 1


def test_raw_stream_ends_with_done(server: str) -> None:
    reply = httpx.post(f"http://{server}/v1/chat/completions", json=body("x", stream=True))
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.text.endswith("data: [DONE]\n\n")


REFUSED_CONTENT = {
    "url": (picture("http://169.254.169.254/latest"), 400, "does not load URLs"),
    "file": (picture("file:///etc/passwd"), 400, "does not load URLs or files"),
    "not base64": (picture(PNG + "???"), 400, "not an image"),
    "not an image": (picture(PNG + base64.b64encode(b"hello").decode()), 400, "not an image"),
    "cut image": (picture(PNG + png((1, 2, 3), size=(64, 64))[:100]), 400, "not an image"),
    "part type": (
        [{"type": "video_url"}],
        400,
        "messages.0.content.0.type: 'video_url' parts are not supported",
    ),
    "image without url": ([{"type": "image_url", "image_url": {}}], 400, "url: Field required"),
    "context": ("long", 400, "the model reads 4096"),
    "failure": ("break", 500, "the weights are gone"),
}
REFUSED_FIELDS = {
    "n": ({"n": 9}, 400, "n: "),
    "temperature": ({"temperature": -1}, 400, "temperature"),
    "seed": ({"seed": 2**70}, 400, "seed"),
    "max_tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "model": ({"model": "gpt"}, 404, "this server has 'BLM'"),
    "role": ({"messages": [{"role": "robot", "content": "hi"}]}, 400, "messages.0.role"),
    "empty": ({"messages": []}, 400, "messages"),
}
REFUSED = {name: (body(content), *why) for name, (content, *why) in REFUSED_CONTENT.items()}
REFUSED |= {name: (body("hi", **change), *why) for name, (change, *why) in REFUSED_FIELDS.items()}


@pytest.mark.parametrize("asked, status, message", REFUSED.values(), ids=REFUSED)
def test_bad_chat_requests_say_why(server: str, asked: dict[str, object], status: int, message: str) -> None:
    reply = httpx.post(f"http://{server}/v1/chat/completions", json=asked)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert message in error["message"] and set(error) == {"message", "type", "param", "code"}
    assert httpx.get(f"http://{server}/health").status_code == 200


def test_size_limits() -> None:
    with running(None, EchoGenerator(), chat_limits=ChatLimits(body_bytes=2000, pixels=100)) as address:
        url = f"http://{address}/v1/chat/completions"
        assert httpx.post(url, content=b"{" + b" " * 3000, headers=JSON).status_code == 413
        assert httpx.post(url, content=b"not json", headers=JSON).status_code == 400
        content = picture(PNG + png((0, 0, 0), size=(11, 10)))
        reply = httpx.post(url, json=body(content))
        assert reply.status_code == 400 and "more than 100 pixels" in reply.json()["error"]["message"]
        assert httpx.get(f"http://{address}/version").json()["policy"] is None


def test_full_queue_is_503_with_retry_after_and_control_still_served() -> None:
    generator = EndlessGenerator()
    with running(
        EchoPolicy(), generator, scheduler_limits=SchedulerLimits(max_queued_chats=1, max_sequences=1)
    ) as address:
        url = f"http://{address}/v1/chat/completions"
        replies: list[httpx.Response] = []

        def post() -> None:
            replies.append(httpx.post(url, json=body("hi", max_tokens=4096), timeout=20))

        asking = [threading.Thread(target=post) for _ in range(4)]
        for thread in asking:
            thread.start()
            time.sleep(0.1)
        wait_for(lambda: len(replies) == 2)  # one is answered, one waits, two are turned away
        assert {reply.status_code for reply in replies} == {503}
        assert replies[0].headers["retry-after"] == "1"
        remote = RemotePolicy(f"ws://{address}")
        assert remote.act(observation()).actions.shape == (4, 8)
        remote.close()
        generator.enough.set()
        for thread in asking:
            thread.join()
        assert [reply.status_code for reply in replies[2:]] == [200, 200]


def test_a_chat_ends_when_its_client_leaves() -> None:
    generator = EndlessGenerator()
    with running(None, generator) as address:
        url = f"http://{address}/v1/chat/completions"
        with suppress(httpx.ReadTimeout):
            httpx.post(url, json=body("hi", max_tokens=4096), timeout=0.3)
        wait_for(lambda: not generator.running)
        asked = body("hi", max_tokens=4096, stream=True)
        with httpx.stream("POST", url, json=asked, timeout=5) as reply:
            for number, _ in enumerate(reply.iter_lines()):
                if number > 20:
                    break
        wait_for(lambda: not generator.running)


class SlowGenerator(EchoGenerator):
    def step(self) -> None:
        time.sleep(0.02)
        super().step()


def test_a_stream_comes_in_pieces() -> None:
    with running(None, SlowGenerator()) as address:
        client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)
        chunks = list(ask(client, "one two three four five", stream=True, n=2))
        client.close()
    for index in (0, 1):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        pieces = [choice.delta.content for choice in mine if choice.delta.content]
        assert "".join(pieces) == "user: one two three four five"
        assert len(pieces) > 2
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["stop"]


def test_draws_have_seeds_of_their_own(client: openai.OpenAI) -> None:
    done = ask(client, "x", n=3, temperature=0.5, seed=7)
    assert [choice.message.content for choice in done.choices] == [f"user: x seed {n}" for n in (7, 8, 9)]
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    free = {ask(client, "x", temperature=0.5).choices[0].message.content for _ in range(3)}
    assert len(free) == 3


@pytest.mark.parametrize("stop", [[], ["lo w"], ["world", "o"], ["zzz"], ["d!"], ["l", "o"]])
def test_streamed_text_is_never_retracted(stop: list[str]) -> None:
    whole = "  hello  world of\n robots!  "
    expected = whole.lstrip()
    cuts = [cut for cut in map(expected.find, stop) if cut >= 0]
    expected = expected[: min(cuts)] if cuts else expected.rstrip()
    answer, sent = VisibleText(stop), ""
    for length in range(1, len(whole) + 1):
        if answer.finish is None:
            sent += answer.add(whole[:length], length, "length" if length == len(whole) else None)
            assert expected.startswith(sent)
    assert sent == answer.sent == expected
    assert answer.finish == ("stop" if cuts else "length")


def test_incomplete_characters_are_held_back() -> None:
    answer = VisibleText([])
    assert answer.add("a\ufffd", 1, None) == "a"
    assert answer.add("aé", 2, None) == "é"


# --- the model's thread ---


def test_an_action_waits_for_one_token_and_not_for_an_answer() -> None:
    generator = EndlessGenerator()

    async def scenario() -> None:
        scheduler = ModelScheduler(EchoPolicy(), generator)
        chat = scheduler.chat((Message("user", ("hi",)),), [Sampling(max_tokens=4096)])
        await anext(aiter(chat))
        for seed in range(5):
            before = generator.steps
            result = await scheduler.act(observation(seed=seed))
            assert (result.chunk.actions == EchoPolicy().act(observation(seed=seed)).actions).all()
            assert generator.steps <= before + 3
        scheduler.cancel(chat)
        scheduler.close()
        scheduler.join()
        assert not generator.running

    asyncio.run(scenario())


def test_observations_that_wait_are_answered_together_each_its_own() -> None:
    policy = BatchEcho()

    async def scenario() -> None:
        scheduler = ModelScheduler(policy, None, SchedulerLimits(max_action_batch=4))
        seen = [observation(seed=seed) for seed in range(10)]
        seen[5] = Observation(**{**vars(seen[5]), "instruction": "break"})
        jobs = [asyncio.create_task(scheduler.act(one)) for one in seen]
        await asyncio.sleep(0.1)
        jobs[2].cancel()
        policy.go.set()
        done = await asyncio.gather(*jobs, return_exceptions=True)
        for number, (result, one) in enumerate(zip(done, seen, strict=True)):
            if number == 2:
                assert isinstance(result, asyncio.CancelledError)
            elif number == 5:
                assert isinstance(result, RuntimeError)
            else:
                assert (result.chunk.actions == EchoPolicy().act(one).actions).all()
        assert max(policy.sizes) == 4
        scheduler.close()
        scheduler.join()

    asyncio.run(scenario())


def test_a_late_chunk_is_not_sent_and_the_connection_stays() -> None:
    policy = BatchEcho()
    with running(policy, None) as address:
        remote = RemotePolicy(f"ws://{address}", deadline_ms=50)
        threading.Timer(0.3, policy.go.set).start()
        with pytest.raises(LateError, match="while the model ran"):
            remote.act(observation())
        assert remote.act(observation()).actions.shape == (4, 8)
        remote.close()


def test_a_chunk_in_progress_reaches_the_policy() -> None:
    got: list[Observation] = []

    class Notes(EchoPolicy):
        def act(self, observation: Observation) -> ActionChunk:
            got.append(observation)
            return super().act(observation)

    left = np.arange(24, dtype=np.float32).reshape(3, 8)
    with running(Notes(), None) as address:
        remote = RemotePolicy(f"ws://{address}")
        remote.act(Observation(**{**vars(observation()), "chunk": left, "inference_delay": 2}))
        remote.close()
    assert got[-1].inference_delay == 2 and (got[-1].chunk == left).all()


def test_health_waits_for_the_first_run_and_tells_of_a_broken_model() -> None:
    gate = threading.Event()

    class Slow(EchoPolicy):
        def act(self, observation: Observation) -> ActionChunk:
            gate.wait(10)
            return super().act(observation)

    with running(Slow(), None) as address:
        assert httpx.get(f"http://{address}/health").status_code == 503
        gate.set()
        wait_for(lambda: httpx.get(f"http://{address}/health").status_code == 200)

    class Broken(EchoPolicy):
        def act(self, observation: Observation) -> ActionChunk:
            raise RuntimeError("no weights")

    with running(Broken(), None) as address:
        wait_for(lambda: httpx.get(f"http://{address}/health").status_code == 500)
        assert "no weights" in httpx.get(f"http://{address}/health").text


def test_requests_in_progress_finish_at_shutdown() -> None:
    generator, replies = EndlessGenerator(), list[str]()
    with running(EchoPolicy(), generator) as address:
        url = f"http://{address}/v1/chat/completions"

        def post() -> None:
            replies.append(httpx.post(url, json=body("hi", max_tokens=4096, stream=True), timeout=20).text)

        asking = threading.Thread(target=post)
        asking.start()
        wait_for(lambda: bool(generator.running))
        remote = RemotePolicy(f"ws://{address}")
        start = time.monotonic()
    assert time.monotonic() - start < 6
    asking.join()
    assert "shutting down" in replies[0].splitlines()[-2]
    with pytest.raises(BlmError, match="closed"):
        remote.act(observation())


HEADERS = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("sent", [b"", b"POST /v1/ch", HEADERS])
def test_connections_without_requests_are_closed(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_TIMEOUT_S", 0.5)
    with running(EchoPolicy(), EchoGenerator()) as address, connected(address) as half_open:
        remote = RemotePolicy(f"ws://{address}")
        half_open.sendall(sent)
        start = time.monotonic()
        assert half_open.recv(1000) == b"" and 0.4 < time.monotonic() - start < 5
        assert remote.act(observation()).actions.shape == (4, 8), "a robot may be silent for longer"


def test_a_body_that_drips_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_TIMEOUT_S", 0.5)
    with running(None, EchoGenerator()) as address, connected(address) as slow:
        slow.sendall(HEADERS + b"Content-Length: 1000\r\n\r\n")
        for _ in range(20):
            slow.sendall(b" ")
            time.sleep(0.05)
        assert b"408" in slow.recv(1000).splitlines()[0]
        assert httpx.get(f"http://{address}/health").status_code == 200


def test_too_many_connections_get_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 8)
    monkeypatch.setattr(connections, "ADDRESS_SHARE", 1.0)
    with running(EchoPolicy(), EchoGenerator()) as address, ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(closing(RemotePolicy(f"ws://{address}")))
        assert httpx.get(f"http://{address}/v1/models").status_code == 503
        stack.close()
        wait_for(lambda: httpx.get(f"http://{address}/v1/models").status_code == 200)


def test_a_lost_robot_is_detected() -> None:
    """It answers no ping: a cable was pulled, no end of the connection arrives."""
    app = create_app(EchoPolicy())
    with running_app(app, ws_ping_interval=0.2, ws_ping_timeout=0.2) as address, connected(address) as gone:
        upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        key = "Sec-WebSocket-Key: " + base64.b64encode(bytes(16)).decode()
        gone.sendall(f"GET / HTTP/1.1\r\nHost: localhost\r\n{upgrade}{key}\r\n\r\n".encode())
        assert b"101" in gone.recv(100)
        end = time.monotonic() + 5
        while gone.recv(1000):
            assert time.monotonic() < end


def test_metrics_have_the_prometheus_format(server: str, client: openai.OpenAI) -> None:
    ask(client, "count me")
    remote = RemotePolicy(f"ws://{server}")
    remote.act(observation())
    remote.close()
    families = {
        sample.name: sample.value
        for family in text_string_to_metric_families(httpx.get(f"http://{server}/metrics").text)
        for sample in family.samples
        if sample.labels in ({}, {"kind": "chat", "status": "200"})
    }
    assert families["blm_requests_total"] >= 1 and families["blm_action_seconds_count"] >= 1
    assert families["blm_chat_tokens_total"] >= 3 and families["blm_waiting_chats"] == 0


def test_the_request_queue_is_bounded() -> None:
    policy = BatchEcho()

    async def scenario() -> None:
        scheduler = ModelScheduler(
            policy, EchoGenerator(), SchedulerLimits(max_queued_actions=2, max_action_batch=1)
        )
        scheduler.ready.wait(5)
        jobs = list[asyncio.Task[ActionResult]]()
        for seed in range(3):  # one is worked on, two wait
            jobs.append(asyncio.create_task(scheduler.act(observation(seed=seed))))
            await asyncio.sleep(0.1)
        with pytest.raises(BusyError, match="2 action requests are waiting"):
            await scheduler.act(observation())
        policy.go.set()
        await asyncio.gather(*jobs)
        scheduler.close()
        scheduler.join()
        with pytest.raises(BusyError, match="shutting down"):
            await scheduler.act(observation())

    asyncio.run(scenario())


def test_json_contract_survives_the_wire() -> None:
    data = wire.unpack(wire.pack(CONTRACT.to_json()))
    assert PolicyContract.from_json(data) == CONTRACT
    assert PolicyContract.from_json(json.loads(json.dumps(CONTRACT.to_json()))) == CONTRACT
