"""The playground without a browser: its socket, its limits, and what it does about faults."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import socket as sockets
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from blm.serving.access.rate_limit import TokenBucket
from blm.serving.app import create_app
from blm.serving.playground import PATH, add_playground, content_policy, read_beside, rollout, session
from blm.serving.playground.session import CloseError, MessageQueue, own_address, read_command
from blm.tasks import Env, rendering
from blm.types import ActionChunk, BlmError, Observation
from tests.support.playground import CONTRACT, StillPolicy
from tests.support.serving import EchoGenerator, running_app


def serving(**options: Any) -> AbstractContextManager[str]:
    policy, key = options.pop("policy", None) or StillPolicy(), options.pop("api_key", None)
    app = create_app(policy, EchoGenerator(), api_key=key)
    add_playground(app, CONTRACT, name="BLM", **options)
    return running_app(app)


def visit(address: str, **options: Any) -> ClientConnection:
    return connect(f"ws://{address}{PATH}/ws", max_size=None, **options)


def until(socket: ClientConnection, kind: str, side: int = 0, **wanted: Any) -> dict[str, Any]:
    """The next message of this kind, and everything of `wanted` in it."""
    while True:
        message = json.loads(socket.recv(timeout=30))
        right = message["type"] == kind and message.get("side", 0) == side
        if right and all(message.get(name) == value for name, value in wanted.items()):
            return message


def send(socket: ClientConnection, kind: str, **fields: Any) -> None:
    socket.send(json.dumps({"type": kind, **fields}))


def start(socket: ClientConnection, kind: str = "start", **change: Any) -> None:
    send(socket, kind, **{"robot": "panda", "task": "push_cube", "seed": 3, **change})


def rollout_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "blm-playground"]


def wait_for(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.02)


# --- what a visitor can do ---


def test_a_visitor_sees_the_model_drive_and_moves_an_object() -> None:
    policy = StillPolicy()
    with serving(policy=policy) as address, visit(address) as socket:
        start(socket, instruction="do nothing, please.")
        scene = until(socket, "scene")
        assert scene["objects"]["cube"] == "blue cube" and scene["cameras"] == list(CONTRACT.cameras)
        frame = until(socket, "frame", state="driving")
        assert frame["images"].keys() == set(CONTRACT.cameras)
        assert isinstance(frame["latency_ms"], int) and frame["solved_at"] is None
        assert policy.told[-1] == "do nothing, please."
        send(socket, "pause", on=True)
        send(socket, "look", id=1)
        before = until(socket, "look", id=1)["images"]
        assert before.keys() == set(CONTRACT.cameras)
        send(socket, "look", id=2)
        assert until(socket, "look", id=2)["images"] == before  # paused: nothing moves
        send(socket, "move", object="cube", dx=0.1, dy=-0.05)
        send(socket, "look", id=3)
        assert until(socket, "look", id=3)["images"]["base"] != before["base"]
        for wrong in ({"object": "moon", "dx": 0.0, "dy": 0.0}, {"object": "cube", "dx": 9.0, "dy": "x"}):
            send(socket, "move", **wrong)
            assert "moon" in (message := until(socket, "error")["message"]) or "at most" in message
        for _ in range(9):
            send(socket, "move", object="cube", dx=0.1, dy=0)
        assert "leave the table" in until(socket, "error")["message"]


def test_a_visitor_dims_the_light_and_turns_it_up_again() -> None:
    with serving(policy=StillPolicy()) as address, visit(address) as socket:
        start(socket, "preview")
        send(socket, "move", object="cube", dx=0.1, dy=0.1)
        looks = []
        for number, brightness in enumerate((1, 0.5, 1)):
            send(socket, "light", brightness=brightness)
            send(socket, "look", id=number)
            looks.append(until(socket, "look", id=number)["images"])
        assert looks[0] == looks[2], "nothing has moved, and the light is as before"
        assert brightness_of(looks[1]["base"]) < 0.7 * brightness_of(looks[0]["base"])
        for wrong in (0.1, 2, "dark", None):
            send(socket, "light", brightness=wrong)
            assert "a number from 0.2 to 1.5" in until(socket, "error")["message"]


def brightness_of(uri: str) -> float:
    with PIL.Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return float(np.asarray(image).mean())


def test_a_scene_is_shown_before_it_is_driven_and_is_driven_as_it_was_left() -> None:
    policy = StillPolicy()
    with serving(policy=policy) as address, visit(address) as socket:
        start(socket, "preview")
        assert until(socket, "questions")["questions"]
        assert until(socket, "frame")["state"] == "ready"
        send(socket, "look", id=1)
        untouched = until(socket, "look", id=1)["images"]
        send(socket, "move", object="cube", dx=0.1, dy=0.1)
        send(socket, "look", id=2)
        assert (moved := until(socket, "look", id=2)["images"]) != untouched
        asked = len(policy.told)
        time.sleep(0.3)
        assert len(policy.told) == asked and len(rollout_threads()) == 1
        start(socket)
        until(socket, "frame", state="driving")
        send(socket, "pause")
        send(socket, "look", id=3)
        seen = until(socket, "look", id=3)["images"]
        assert (
            len(policy.told) > asked
            and seen["base"] != untouched["base"]
            and moved["base"] != untouched["base"]
        )


def test_after_a_stop_the_scene_can_be_looked_at_but_no_step_is_made() -> None:
    policy = StillPolicy()
    with serving(policy=policy) as address, visit(address) as socket:
        start(socket)
        until(socket, "frame", state="driving")
        send(socket, "stop")
        step = until(socket, "frame", state="stopped")["step"]
        asked = len(policy.told)
        time.sleep(0.3)
        send(socket, "look", id=1)
        assert until(socket, "look", id=1)["step"] == step and len(policy.told) == asked
        start(socket)
        assert until(socket, "frame", state="driving")["step"] <= 2  # from the beginning


def test_success_and_its_persistence_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for lasts in (True, False):
        answers = iter([False] * 4 + [True] * 3 + [lasts] * 300)
        monkeypatch.setattr(Env, "evaluate", lambda self, answers=answers: {"success": next(answers)})
        with serving() as address, visit(address) as socket:
            start(socket)  # the first is asked for at the reset
            frame = until(socket, "frame", state="solved")
            assert (frame["solved_at"], frame["step"], frame["holds"]) == (4, 14, lasts)


def test_an_object_is_moved_and_nothing_else() -> None:
    env = Env("panda", "pick_cube", cameras=())
    env.reset(seed=1)
    before = {name: thing.position.copy() for name, thing in env.objects().items()}
    for name in before:
        env.shift_object(name, np.array([0.03, -0.02, 0.0]))
    after = env.objects()
    for name, position in before.items():
        np.testing.assert_allclose(after[name].position, position + np.array([0.03, -0.02, 0.0]), atol=1e-9)
        assert after[name].speed == 0.0
    with pytest.raises(BlmError, match="moon"):
        env.shift_object("moon", np.zeros(3))
    env.close()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"robot": "r2d2"}, "unknown robot 'r2d2'"),
        ({"task": "dance"}, "unknown task 'dance'"),
        ({"task": "x" * 3000}, "unknown task 'xxx"),
        ({"seed": -1}, "the seed is -1"),
        ({"seed": "3"}, "the seed is '3'"),
        ({"seed": 10**300}, "the seed is 1000"),
        ({"seed": 3.0}, "the seed is 3.0"),
        ({"instruction": "x" * 301}, "at most 300"),
        ({"instruction": ["x"]}, "at most 300"),
        ({"models": ["BLM", "moon"]}, "choose one or two of BLM"),
        ({"models": ["BLM"] * 3}, "choose one or two of BLM"),
        ({"models": [["BLM"]]}, "choose one or two of BLM"),
        ({"models": {"BLM": 1}}, "choose one or two of BLM"),
        ({"robot": "widowxai"}, "widowxai"),
    ],
)
def test_invalid_scenes_are_refused_with_a_reason(change: dict[str, Any], message: str) -> None:
    with serving() as address, visit(address) as socket:
        start(socket, **change)
        told = until(socket, "error")["message"]
        assert message in told and len(told) < 400
        start(socket)
        until(socket, "frame", state="driving")  # the connection lives on


def test_two_models_drive_the_same_scene() -> None:
    with (
        serving() as other,
        serving(beside={"other": f"ws://{other}"}) as address,
        visit(address) as socket,
    ):
        start(socket, models=["BLM", "other"])
        first = dict[int, dict[str, str]]()
        while len(first) < 2:
            message = json.loads(socket.recv(timeout=30))
            if message["type"] == "frame" and message["step"] == 0:
                first[message["side"]] = message["images"]
        assert first[0] == first[1]
        assert len(rollout_threads()) == 2
        until(socket, "frame", side=1, state="driving")
    with pytest.raises(BlmError, match="choose another name"):
        add_playground(create_app(StillPolicy()), CONTRACT, name="BLM", beside={"BLM": "ws://x"})


# --- keys and pages ---


def test_a_key_is_needed_for_page_and_socket_and_a_browser_signs_in_with_it() -> None:
    with serving(api_key="sesame") as address, httpx.Client(base_url=f"http://{address}") as browser:
        form = browser.get(PATH)
        assert form.status_code == 401 and 'name="key"' in form.text
        assert "still" not in form.text and "push_cube" not in form.text and "panda" not in form.text
        with pytest.raises(InvalidStatus, match="401"):
            visit(address)
        wrong = browser.post(f"{PATH}/login", data={"key": "wrong"})
        assert wrong.status_code == 401 and "wrong API key" in wrong.text and "sesame" not in wrong.text
        assert browser.post(f"{PATH}/login", data={"key": "sesame"}).status_code == 303
        page = browser.get(PATH)
        assert page.status_code == 200 and "push_cube" in page.text and "sesame" not in page.text
        cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
        assert "sesame" not in cookie
        for headers in ({"Cookie": cookie}, {"Authorization": "Bearer sesame"}):
            with visit(address, additional_headers=headers) as socket:
                start(socket)
                until(socket, "frame", state="driving")  # so the rollout may ask its own server too


def test_other_pages_are_refused_and_framing_is_forbidden() -> None:
    with serving() as address:
        with pytest.raises(InvalidStatus, match="403"):
            visit(address, origin="http://evil.example")
        with visit(address, origin=f"http://{address}") as socket:
            start(socket)
            until(socket, "frame", state="driving")
        page = httpx.get(f"http://{address}{PATH}")
        policy = page.headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in policy and "unsafe-inline" not in policy
        nonce = re.search(r"script-src 'nonce-([\w-]+)'", policy)
        assert nonce is not None and page.text.count(f'nonce="{nonce[1]}"') == 2
        assert nonce[1] not in httpx.get(f"http://{address}{PATH}").text  # of this answer only
        assert not re.search(r'\son\w+="|style="', page.text)  # the policy would forbid them
        assert "localStorage" not in page.text and "sessionStorage" not in page.text
        assert "default-src 'none'" in content_policy("x")


def test_sockets_without_a_key_do_not_lock_out_clients() -> None:
    with serving(api_key="sesame") as address, ExitStack() as opened:
        for _ in range(30):
            with pytest.raises(InvalidStatus):
                visit(address)
        host, port = address.split(":")
        for _ in range(30):  # they connect and say nothing
            opened.enter_context(closing(sockets.create_connection((host, int(port)))))
        with visit(address, additional_headers={"Authorization": "Bearer sesame"}) as socket:
            start(socket)
            until(socket, "frame", state="driving")


@pytest.mark.parametrize(
    "server, address",
    [
        (("127.0.0.1", 8000), "ws://127.0.0.1:8000"),
        (("192.168.0.7", 80), "ws://192.168.0.7:80"),
        (("0.0.0.0", 8000), "ws://127.0.0.1:8000"),
        (("", 8000), "ws://127.0.0.1:8000"),
        (("::1", 8000), "ws://[::1]:8000"),
        (("::", 8000), "ws://[::1]:8000"),
        (("2001:db8::7", 8000), "ws://[2001:db8::7]:8000"),
        (("fe80::1%eth0", 8000), "ws://[::1]:8000"),
        (("::ffff:127.0.0.1", 8000), "ws://127.0.0.1:8000"),
        (("::ffff:0.0.0.0", 8000), "ws://127.0.0.1:8000"),
        (("localhost", 8000), "ws://localhost:8000"),
        (("/run/blm.sock", None), None),
        (None, None),
    ],
)
def test_the_address_at_which_a_server_reaches_itself(server: Any, address: str | None) -> None:
    assert own_address(server) == address


@pytest.mark.parametrize("host, reached", [("::1", "[::1]"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]")])
def test_a_server_on_other_addresses_drives_with_its_own_model(host: str, reached: str) -> None:
    app = create_app(StillPolicy(), api_key="sesame")
    add_playground(app, CONTRACT, name="BLM")
    try:
        sockets.create_server(("::1", 0), family=sockets.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with running_app(app, host=host) as address:
        place = f"{reached}:{address.rpartition(':')[2]}"
        with visit(place, additional_headers={"Authorization": "Bearer sesame"}) as socket:
            start(socket)
            until(socket, "frame", state="driving")


# --- limits ---


class Reader(threading.Thread):
    """Takes what a socket gets until it is closed, and counts the rollout threads at each message."""

    def __init__(self, socket: ClientConnection) -> None:
        super().__init__()
        self.socket, self.messages, self.most_threads = socket, list[dict[str, Any]](), 0
        self.start()

    def run(self) -> None:
        with suppress(ConnectionClosed):
            while True:
                self.messages.append(json.loads(self.socket.recv(timeout=60)))
                self.most_threads = max(self.most_threads, len(rollout_threads()))

    def got(self, kind: str, **wanted: Any) -> bool:
        return any({"type": kind, **wanted}.items() <= message.items() for message in self.messages)


def test_many_starts_make_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, run = list[str](), rollout.Rollout.run
    others = [one for one in rendering._open if one._gl is not None]  # of tests before this one
    monkeypatch.setattr(rollout.Rollout, "run", lambda self: (begun.append(self.name), run(self))[1])
    with serving() as address, visit(address) as socket:
        reader = Reader(socket)
        opened = time.monotonic()
        for seed in range(150):
            start(socket, seed=seed)
        send(socket, "look", id=7)
        wait_for(lambda: reader.got("look", id=7), 60)
        assert any("too many scenes" in message.get("message", "") for message in reader.messages)
        allowed = session.STARTS_AT_ONCE + session.STARTS_PER_S * (time.monotonic() - opened) + 1
        assert reader.most_threads == 1 and len(begun) <= allowed < 150
    wait_for(lambda: not rollout_threads())
    # freed in their threads
    wait_for(lambda: not [one for one in rendering._open if one._gl is not None and one not in others])


def test_simulators_are_counted_over_all_visitors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_ROLLOUTS", 1)
    with serving() as address, visit(address) as first, visit(address) as second:
        start(first)
        until(first, "frame", state="driving")
        start(second)
        assert "at most 1" in until(second, "error")["message"]
        first.close()
        wait_for(lambda: not rollout_threads())
        start(second)
        until(second, "frame", state="driving")


def test_a_run_that_does_not_end_keeps_the_next_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "CLOSE_TIMEOUT_S", 0.2)
    release = threading.Event()

    class Stuck(StillPolicy):
        def act(self, observation: Observation) -> ActionChunk:
            release.wait(20)
            return super().act(observation)

    with serving(policy=Stuck()) as address, visit(address) as socket:
        start(socket)
        until(socket, "frame", state="connecting")
        time.sleep(0.3)
        for _ in range(3):
            start(socket, seed=4)
            assert "still waits for its model" in until(socket, "error")["message"]
        assert len(rollout_threads()) == 1
        release.set()
        wait_for(lambda: not rollout_threads())
        start(socket, seed=5)
        until(socket, "frame", state="driving")


def test_visitors_are_limited_and_idle_ones_are_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blm.serving.playground.MAX_VISITORS", 1)
    with serving() as address, visit(address) as first:
        start(first)
        until(first, "frame", state="driving")
        with visit(address) as second:
            assert "visitors" in until(second, "error")["message"]
        monkeypatch.setattr("blm.serving.playground.EVICTABLE_S", 0.2)
        time.sleep(0.4)
        with visit(address) as second:  # the first one watches a run
            assert "visitors" in until(second, "error")["message"]
        send(first, "stop")
        until(first, "frame", state="stopped")
        time.sleep(0.4)
        with visit(address) as second:
            start(second)
            until(second, "frame", state="driving")
            with pytest.raises(ConnectionClosed, match="idle page"):
                while True:
                    first.recv(timeout=5)


def test_an_idle_visitor_is_disconnected_unless_a_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "IDLE_S", 1.0)
    with serving() as address:
        with visit(address) as socket, pytest.raises(ConnectionClosed, match="without use"):
            socket.recv(timeout=10)
        with visit(address) as socket:
            start(socket)
            until(socket, "frame", step=40)  # 2 s
            send(socket, "stop")
            with pytest.raises(ConnectionClosed, match="without use"):
                while True:
                    socket.recv(timeout=10)
        wait_for(lambda: not rollout_threads())


NONSENSE = (
    "[]",
    "not json",
    "",
    "7",
    '{"type": "fly"}',
    '{"type": null}',
    '{"type": ["start"]}',
    '{"type": "move"}',
    '{"type": "light"}',
    '{"type": "light", "brightness": NaN}',
    '{"type": "move", "object": "cube", "dx": NaN, "dy": 0}',
    '{"type": "move", "object": "cube", "dx": Infinity, "dy": 0}',
    '{"type": "move", "object": "cube", "dx": 1e999, "dy": 0}',
    '{"type": "move", "object": {"a": []}, "dx": 0, "dy": 0}',
    f'{{"type": "move", "object": "cube", "dx": {"9" * 4000}, "dy": 0}}',
    f'{{"type": "start", "seed": {"9" * 4000}}}',
    "[" * 4000,
    '{"a":' * 600,
    b"\x00\x01",
)


def test_invalid_commands_get_an_error() -> None:
    with serving() as address, visit(address) as socket, visit(address) as other:
        start(socket, "preview")
        start(other)
        until(socket, "frame")
        for nonsense in NONSENSE:
            socket.send(nonsense)
            assert len(until(socket, "error")["message"]) < 400, nonsense
        send(socket, "look", id={"deep": [1]}, side=0)
        assert until(socket, "look")["id"] is None
        for side in ("x", 7, [], None):
            send(socket, "look", id=1, side=side)
        until(socket, "look", id=1)
        start(socket)
        until(socket, "frame", state="driving")
        until(other, "frame", state="driving")


def test_a_command_that_is_too_long_ends_the_connection() -> None:
    with serving() as address, visit(address) as socket:
        socket.send(json.dumps({"type": "look", "id": "x" * 5000}))
        with pytest.raises(ConnectionClosed, match="4096 characters"):
            socket.recv(timeout=10)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=200), st.from_regex(r'\{"type": ?"(move|look)".*', fullmatch=True)))
def test_a_command_is_an_object_or_refused(text: str) -> None:
    try:
        assert isinstance(read_command(text), dict)
    except BlmError as error:
        assert len(str(error)) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def test_no_command_ends_a_session_or_makes_a_second_thread() -> None:
    with serving() as address, visit(address) as socket:
        start(socket, "preview")
        until(socket, "frame")

        @settings(max_examples=60, deadline=None)
        @given(
            st.sampled_from(["start", "preview", "pause", "stop", "look", "move", "light"]),
            st.dictionaries(
                st.sampled_from(["robot", "task", "seed", "instruction", "models", "side", "id", "on"])
                | st.sampled_from(["object", "dx", "dy", "brightness"]),
                JSON | st.sampled_from(["panda", "push_cube", "cube"]),
            ),
        )
        def try_command(kind: str, fields: dict[str, Any]) -> None:
            socket.send(json.dumps({**fields, "type": kind}))
            assert len(rollout_threads()) <= 1

        try_command()
        send(socket, "stop")
        time.sleep(4)  # until a start is allowed again
        start(socket, seed=9)
        until(socket, "frame", state="driving")


def test_a_flood_of_commands_waits_at_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "COMMANDS_PER_S", 200.0)
    sizes, put = list[int](), rollout.Rollout.send

    def counting(self: rollout.Rollout, command: Any) -> None:
        put(self, command)
        sizes.append(self._commands.qsize())

    monkeypatch.setattr(rollout.Rollout, "send", counting)
    with serving() as address, visit(address) as socket, visit(address) as other:
        start(socket)
        reader = Reader(socket)
        for number in range(400):
            send(socket, "look", id=number)
        start(other)
        until(other, "frame", state="driving")

        def answered_again() -> bool:
            send(socket, "look", id=-1)
            time.sleep(0.2)
            return reader.got("look", id=-1)

        wait_for(answered_again, 30)
        assert max(sizes) <= rollout.MAX_WAITING_COMMANDS


def test_of_pictures_only_the_newest_waits_and_a_browser_too_far_behind_is_let_go() -> None:
    async def check() -> None:
        message_queue = MessageQueue()
        for step in range(1000):
            message_queue.put({"type": "frame", "step": step, "side": 0})
            message_queue.put({"type": "frame", "step": step, "side": 1})
        message_queue.put({"type": "error", "message": "x"})
        assert (await message_queue.get())["type"] == "error"
        assert [(await message_queue.get())["step"] for _ in range(2)] == [999, 999]
        message_queue.put({"type": "frame", "step": 1})
        message_queue.put({"type": "scene"})
        assert (await message_queue.get())["type"] == "scene"  # the picture was of the scene before
        for number in range(1000):
            message_queue.put({"type": "look", "id": number})
        assert len(message_queue._others) <= session.MAX_WAITING_MESSAGES
        with pytest.raises(CloseError, match="too slow"):
            await message_queue.get()

    asyncio.run(check())


def test_a_browser_that_does_not_read_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "SEND_TIMEOUT_S", 0.5)
    monkeypatch.setattr(rollout, "LARGE", 480)
    monkeypatch.setattr(rollout, "MAX_STEPS", 100_000)
    raw = rollout.data_uri
    monkeypatch.setattr(rollout, "data_uri", lambda image, form: raw(image, form) + "x" * 500_000)
    with serving() as address, visit(address, max_queue=1, close_timeout=0.5) as slow:
        start(slow)
        wait_for(lambda: bool(rollout_threads()))
        wait_for(lambda: not rollout_threads(), 30)


def test_a_token_bucket_allows_a_burst_and_then_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bucket = TokenBucket(rate=2.0, burst=3)
    assert [bucket.try_take() for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    now += 0.5
    assert [bucket.try_take() for _ in range(2)] == [0.0, 0.5]
    now += 100.0
    assert [bucket.try_take() == 0 for _ in range(5)] == [True, True, True, False, False]


# --- faults of models and simulators ---


class Faulty(StillPolicy):
    def __init__(self, actions: Any) -> None:
        super().__init__()
        self.actions = actions

    def act(self, observation: Observation) -> ActionChunk:
        if isinstance(self.actions, Exception):
            raise self.actions
        return ActionChunk(actions=self.actions)


@pytest.mark.parametrize(
    "fault, message",
    [
        (RuntimeError("the weights are gone"), "weights are gone"),
        (BlmError("no"), "no"),
        (np.full((4, 8), np.nan, np.float32), ""),
        (np.zeros((4, 3), np.float32), ""),
        (np.zeros((0, 8), np.float32), ""),
    ],
)
def test_a_failing_model_is_reported_and_the_scene_stays(fault: Any, message: str) -> None:
    with serving(policy=Faulty(fault)) as address, visit(address) as socket:
        start(socket)
        told = until(socket, "error", state="error")["message"]
        assert message in told and len(told) < 400
        until(socket, "frame", state="error")
        send(socket, "look", id=1)
        until(socket, "look", id=1)


def test_a_failing_simulator_is_reported_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Env.picture
    with serving() as address, visit(address) as socket:
        monkeypatch.setattr(Env, "picture", lambda *_: (_ for _ in ()).throw(RuntimeError("no light")))
        start(socket)
        assert "no light" in until(socket, "error", state="error")["message"]
        wait_for(lambda: not rollout_threads())
        monkeypatch.setattr(Env, "picture", picture)
        start(socket)
        until(socket, "frame", state="driving")


def test_an_unavailable_comparison_server_is_reported() -> None:
    with serving(beside={"gone": "ws://127.0.0.1:9"}) as address, visit(address) as socket:
        start(socket, models=["BLM", "gone"])
        assert "127.0.0.1:9" in until(socket, "error", side=1)["message"]
        until(socket, "frame", state="driving")


def test_a_server_that_stops_ends_its_rollouts() -> None:
    with ExitStack() as opened:
        with serving() as address:
            socket = opened.enter_context(visit(address))
            start(socket)
            until(socket, "frame", state="driving")
        wait_for(lambda: not rollout_threads())


def test_a_model_without_a_policy_can_be_asked_but_does_not_drive() -> None:
    app = create_app(None, EchoGenerator())
    add_playground(app, None, name="BLM")
    with running_app(app) as address, visit(address) as socket:
        assert '"policy": false' in httpx.get(f"http://{address}{PATH}").text
        start(socket, "preview", robot="widowxai")
        until(socket, "frame", state="ready")
        send(socket, "look", id=1)
        assert until(socket, "look", id=1)["images"]
        start(socket, robot="widowxai")
        assert "no policy" in until(socket, "error", state="error")["message"]
    app = create_app(StillPolicy(), None)
    add_playground(app, CONTRACT, name="BLM")
    with running_app(app) as address:
        assert '"chat": false' in httpx.get(f"http://{address}{PATH}").text


def test_addresses_to_compare_with() -> None:
    assert read_beside(["a=ws://x:1", "b=wss://y"]) == {"a": "ws://x:1", "b": "wss://y"}
    for wrong in (["ws://x:1"], ["=ws://x"], ["a=http://x"], ["a=ws://x", "a=ws://y"]):
        with pytest.raises(BlmError, match="not of the form"):
            read_beside(wrong)
