"""The playground: its socket without a browser, and the page in a real one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from test_serving import EchoSpeaker, Words, running_app
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from blm.robots import ROBOTS
from blm.serving.app import create_app
from blm.serving.playground import PATH, add_playground, read_beside
from blm.tasks import Env
from blm.types import ActionChunk, BlmError, Message, Observation, PolicyContract, Sampling

CONTRACT = PolicyContract(
    action_spaces={name: ROBOTS[name].action_space for name in ("panda", "xarm6")},
    cameras=("base", "wrist"),
    image_size=32,
    horizon=4,
    execute=2,
    revision="still",
)


class StillPolicy:
    """Holds the arm where it is, and remembers what it was told."""

    contract = CONTRACT

    def __init__(self) -> None:
        self.told = list[str]()

    def act(self, observation: Observation) -> ActionChunk:
        self.told.append(observation.instruction)
        return ActionChunk(actions=np.tile(observation.state, (4, 1)))

    def reset(self) -> None: ...


def serving(**options: Any) -> AbstractContextManager[str]:
    app = create_app(
        options.pop("policy", None) or StillPolicy(), EchoSpeaker(), api_key=options.get("api_key")
    )
    add_playground(app, CONTRACT, name="BLM", **options)
    return running_app(app)


def until(socket: ClientConnection, kind: str, side: int = 0, **wanted: Any) -> dict[str, Any]:
    """The next message of this kind, and everything of `wanted` in it."""
    while True:
        message = json.loads(socket.recv(timeout=30))
        right = message["type"] == kind and message.get("side", 0) == side
        if right and all(message.get(name) == value for name, value in wanted.items()):
            return message


def start(socket: ClientConnection, **change: Any) -> None:
    scene = {"type": "start", "robot": "panda", "task": "push_cube", "seed": 3}
    socket.send(json.dumps({**scene, **change}))


def test_a_visitor_sees_the_model_drive_and_reaches_in() -> None:
    policy = StillPolicy()
    with serving(policy=policy) as address, connect(f"ws://{address}{PATH}/ws") as socket:
        start(socket, instruction="do nothing, please.")
        assert until(socket, "scene")["objects"]["cube"] == "blue cube"
        frame = until(socket, "frame", step=3)
        assert frame["images"].keys() == {"base", "wrist"} and frame["latency_ms"] > 0
        assert policy.told[-1] == "do nothing, please."
        socket.send(json.dumps({"type": "pause", "on": True}))
        socket.send(json.dumps({"type": "look", "id": 1}))
        before = until(socket, "look", id=1)["images"]
        assert before.keys() == set(CONTRACT.cameras)
        socket.send(json.dumps({"type": "look", "id": 2}))
        assert until(socket, "look", id=2)["images"] == before  # paused: nothing moves
        socket.send(json.dumps({"type": "move", "object": "cube", "dx": 0.1, "dy": -0.05}))
        socket.send(json.dumps({"type": "look", "id": 3}))
        assert until(socket, "look", id=3)["images"]["base"] != before["base"]
        for wrong in ({"object": "moon", "dx": 0.0, "dy": 0.0}, {"object": "cube", "dx": 9.0, "dy": "x"}):
            socket.send(json.dumps({"type": "move", **wrong}))
            assert "moon" in (said := until(socket, "error")["message"]) or "at most" in said


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
        ({"seed": -1}, "the seed is -1"),
        ({"seed": "3"}, "the seed is '3'"),
        ({"instruction": "x" * 301}, "at most 300"),
        ({"models": ["BLM", "moon"]}, "choose one or two of BLM"),
        ({"robot": "widowxai"}, "widowxai"),
    ],
)
def test_what_cannot_be_shown_says_why(change: dict[str, Any], message: str) -> None:
    with serving() as address, connect(f"ws://{address}{PATH}/ws") as socket:
        start(socket, **change)
        assert message in until(socket, "error")["message"]
        for nonsense in ("[]", "not json", '{"type": "fly"}', '{"type": "move"}'):
            socket.send(nonsense)
        start(socket)
        until(socket, "frame", step=1)  # the connection lives on


def test_two_models_drive_the_same_scene() -> None:
    with (
        serving() as other,
        serving(beside={"other": f"ws://{other}"}) as address,
        connect(f"ws://{address}{PATH}/ws") as socket,
    ):
        start(socket, models=["BLM", "other"])
        first = dict[int, dict[str, str]]()
        while len(first) < 2:
            message = json.loads(socket.recv(timeout=30))
            if message["type"] == "frame" and message.get("step") == 0:
                first[message["side"]] = message["images"]
        assert first[0] == first[1]


def test_other_pages_and_wrong_keys_stay_outside() -> None:
    with serving(api_key="sesame") as address:
        with pytest.raises(InvalidStatus), connect(f"ws://{address}{PATH}/ws", origin="http://evil.example"):
            pass
        with connect(f"ws://{address}{PATH}/ws", origin=f"http://{address}") as socket:
            socket.send(json.dumps({"key": "wrong"}))
            assert "API key" in until(socket, "error")["message"]
        with connect(f"ws://{address}{PATH}/ws") as socket:
            socket.send(json.dumps({"key": "sesame"}))
            start(socket)
            until(socket, "frame", step=1)
        assert "sesame" not in httpx.get(f"http://{address}{PATH}").text


def test_only_so_many_visitors_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blm.serving.playground.MOST_VISITORS", 1)
    with serving() as address, connect(f"ws://{address}{PATH}/ws") as first:
        start(first)
        until(first, "frame", step=1)
        with connect(f"ws://{address}{PATH}/ws") as second:
            assert "visitors" in until(second, "error")["message"]


def test_addresses_to_compare_with() -> None:
    assert read_beside(["a=ws://x:1", "b=wss://y"]) == {"a": "ws://x:1", "b": "wss://y"}
    for wrong in (["ws://x:1"], ["=ws://x"], ["a=http://x"], ["a=ws://x", "a=ws://y"]):
        with pytest.raises(BlmError, match="not of the form"):
            read_beside(wrong)


# --- a real browser ---

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Thinker(EchoSpeaker):
    def begin(self, messages: Sequence[Message], sampling: Sampling) -> Words:
        said = (
            f"<think>{len(messages[-1].images)} pictures</think> I see a cube, and heard: {messages[-1].text}"
        )
        return Words(said, 1, 50)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium)")
@pytest.mark.parametrize("width, height", [(1280, 800), (390, 844)])
def test_the_page_in_a_browser(tmp_path: Path, width: int, height: int) -> None:
    from playwright.sync_api import expect, sync_playwright

    app = create_app(StillPolicy(), Thinker())
    add_playground(app, CONTRACT, name="BLM")
    with running_app(app) as address, sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        faults = list[str]()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
        page.goto(f"http://{address}{PATH}")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.get_by_label("Task").select_option("pick_cube")
        page.get_by_role("button", name="Start").focus()
        page.keyboard.press("Enter")
        expect(page.get_by_text("under way")).to_be_visible(timeout=20_000)
        expect(page.locator("#step-0")).to_have_text(re.compile(r"^([5-9]|\d\d+)$"), timeout=20_000)
        expect(page.get_by_alt_text("BLM seen from the wrist")).to_have_attribute(
            "src", re.compile("^data:image/jpeg;base64,")
        )
        page.get_by_role("button", name="towards the robot").click()
        page.get_by_label("Question").fill("What is red?")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.get_by_text("I see a cube, and heard: What is red?")).to_be_visible(timeout=20_000)
        expect(page.get_by_text("2 pictures")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert not faults
        page.screenshot(path=tmp_path / f"page{width}.png", full_page=True)
        assert (tmp_path / f"page{width}.png").stat().st_size > 10_000
        page.get_by_label("Seed").evaluate("field => { field.removeAttribute('min'); field.value = -5; }")
        page.get_by_role("button", name="Start").click()
        expect(page.get_by_role("alert")).to_contain_text("the seed is -5")
        browser.close()
