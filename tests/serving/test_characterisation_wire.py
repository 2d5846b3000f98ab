"""Characterisation of the wire: routes, statuses, JSON keys, msgpack keys and message types.

Recorded in characterisation_wire.json beside this file: keys and types only, no values that vary. After an
intended change, record it again and read the difference:
`python -m tests.serving.test_characterisation_wire`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openpi_client import msgpack_numpy
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from blm.serving.app import create_app
from blm.serving.playground import PATH, add_playground
from blm.types import Message
from tests.support import groot
from tests.support import playground as scenes
from tests.support.serving import (
    BatchEcho,
    EchoGenerator,
    EchoPolicy,
    observation,
    running,
    running_app,
)

RECORD = Path(__file__).with_name("characterisation_wire.json")
HELLO = [{"role": "user", "content": "Hello"}]
JSON_BODY = {"Content-Type": "application/json"}


class Letters:
    """A tokenizer whose tokens are the code points of a text."""

    vocabulary = 128

    def encode(self, text: str, *, special: bool) -> list[int]:
        return [ord(character) for character in text]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return self.encode("".join(message.text for message in messages), special=True)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))

    def names(self, tokens: Sequence[int]) -> list[str]:
        return [self.decode([token]) for token in tokens]


class Chatty(EchoGenerator):
    tokenizer = Letters()


def shape_of(value: Any) -> Any:
    """A value as its keys and the types of its leaves; of a list its first element."""
    if isinstance(value, dict):
        named = {key if isinstance(key, str) else repr(key): shape_of(item) for key, item in value.items()}
        return dict(sorted(named.items()))
    if isinstance(value, list | tuple):
        return [shape_of(value[0])] if len(value) else []
    if isinstance(value, np.ndarray):
        return f"array {value.dtype} of {value.ndim} axes"
    return type(value).__name__


def http_shape(reply: httpx.Response) -> Any:
    kind = reply.headers.get("content-type", "").partition(";")[0]
    found: dict[str, Any] = {"status": reply.status_code, "content": kind}
    if kind == "application/json":
        content = reply.json()
        found["content"] = shape_of(content)
        if "error" in content:
            found["error"] = {name: content["error"][name] for name in ("type", "code", "param")}
    for name in ("retry-after", "www-authenticate"):
        if name in reply.headers:
            found[name] = reply.headers[name]
    return found


def events_of(reply: httpx.Response) -> list[Any]:
    """The distinct shapes of the events of a stream, in the order in which they come."""
    shapes: list[Any] = []
    for line in reply.text.split("\n\n"):
        data = line.removeprefix("data: ")
        if data:
            shape = data if data == "[DONE]" else shape_of(json.loads(data))
            if shape not in shapes:
                shapes.append(shape)
    return shapes


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": "BLM", "messages": HELLO, **fields}


def record_routes() -> dict[str, Any]:
    """Route -> its methods, and the shapes of a good request and of a refused one."""
    found: dict[str, Any] = {}
    app = create_app(EchoPolicy(), Chatty(), api_key="secret")
    add_playground(app, scenes.CONTRACT, name="BLM")
    routes = {
        (route.path, ",".join(sorted(getattr(route, "methods", None) or ["WS"]))) for route in app.routes
    }
    found["routes"] = sorted(f"{methods} {path}" for path, methods in routes)
    with running_app(app) as address:
        key = {"Authorization": "Bearer secret"}
        with httpx.Client(base_url=f"http://{address}", headers=key, timeout=20) as http:

            def get(path: str, **headers: str) -> None:
                found[f"GET {path} {headers or ''}".strip()] = http_shape(http.get(path, headers=headers))

            def post(label: str, path: str, body: Any) -> None:
                found[f"POST {path}: {label}"] = http_shape(http.post(path, json=body))

            for path in ("/health", "/healthz", "/ping", "/version", "/metrics", "/v1/models"):
                get(path)
            for path in ("/v1/models/BLM", "/v1/models/other", "/no/such/path", "/playground"):
                get(path)
            get("/v1/models", Authorization="Bearer wrong")
            get("/version", Host="evil.example")
            get("/version", Origin="https://evil.example")
            post("good", "/v1/chat/completions", chat_body())
            post("several", "/v1/chat/completions", chat_body(n=2, temperature=1, seed=1))
            post("reasoning apart", "/v1/chat/completions", chat_body(separate_reasoning=True))
            post("unknown field", "/v1/chat/completions", chat_body(messagess=[]))
            post("unsupported field", "/v1/chat/completions", chat_body(tools=[{}]))
            post("wrong value", "/v1/chat/completions", chat_body(temperature=9))
            post("other model", "/v1/chat/completions", chat_body(model="gpt"))
            post("not for the model", "/v1/chat/completions", {**chat_body(), "messages": [
                {"role": "user", "content": "long"}]})  # fmt: skip
            post("broken model", "/v1/chat/completions", {**chat_body(), "messages": [
                {"role": "user", "content": "break"}]})  # fmt: skip
            post("prompt", "/tokenize", {"prompt": "Hi", "return_token_strs": True})
            post("messages", "/tokenize", {"model": "BLM", "messages": HELLO})
            post("neither", "/tokenize", {})
            post("good", "/detokenize", {"tokens": [72, 105]})
            post("no token", "/detokenize", {"tokens": [9999]})
            post("good", "/playground/login", {"key": "secret"})
            post("wrong key", "/playground/login", {"key": "wrong"})
            post("good", "/playground/logout", {})
            found["POST as text"] = http_shape(http.post("/v1/chat/completions", content=b"{}"))
            found["POST not JSON"] = http_shape(
                http.post("/v1/chat/completions", content=b"{", headers=JSON_BODY)
            )
            found["version"] = sorted(http.get("/version").json()["policy"])
            text = http.get("/metrics").text
            kinds = set(re.findall(r"^# TYPE (.+)$", text, re.MULTILINE))
            found["metrics"] = sorted(kind for kind in kinds if "_created" not in kind)
            found["labels"] = sorted(
                set(re.findall(r"^(blm_requests_total\{\w+=.*?,\w+)=", text, re.MULTILINE))
            )
    return found


def record_missing_spaces() -> dict[str, Any]:
    """What a server says of the space that its checkpoint lacks."""
    found: dict[str, Any] = {}
    with running(EchoPolicy(), None) as address:
        reply = httpx.post(f"http://{address}/v1/chat/completions", json=chat_body())
        found["no chat"] = http_shape(reply), reply.json()["error"]["code"]
    with running(None, EchoGenerator()) as address, pytest.raises(InvalidStatus) as refused:
        connect(f"ws://{address}")
    response = refused.value.response
    body = json.loads(response.body or b"")
    found["no policy"] = response.status_code, shape_of(body), body["error"]["code"]
    return found


def record_streams() -> dict[str, Any]:
    with running(EchoPolicy(), EchoGenerator()) as address:
        url = f"http://{address}/v1/chat/completions"
        plain = httpx.post(url, json=chat_body(stream=True))
        counted = httpx.post(
            url,
            json=chat_body(
                stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}
            ),
        )
        return {
            "type": plain.headers["content-type"],
            "plain": events_of(plain),
            "with counts": events_of(counted),
        }


def openpi_request(**fields: Any) -> dict[str, Any]:
    seen = observation()
    images = {f"observation/images/{camera}": image for camera, image in seen.images.items()}
    request = {"observation/state": seen.state, "prompt": seen.instruction, "robot": "panda", "seed": 1}
    return {**request, **images, **fields}


def record_openpi() -> dict[str, Any]:
    found: dict[str, Any] = {}
    policy = BatchEcho()
    policy.go.set()
    with running(policy, None) as address, connect(f"ws://{address}", max_size=None) as socket:

        def ask(label: str, **fields: Any) -> None:
            request = openpi_request(**fields)
            socket.send(msgpack_numpy.packb(request))
            reply = msgpack_numpy.unpackb(socket.recv())
            found[label] = {"request": shape_of(request), "reply": shape_of(reply)}

        found["metadata"] = shape_of(msgpack_numpy.unpackb(socket.recv()))
        ask("first")
        ask("second")
        ask("numbered", request_id=7, observed_s=1.5)
        ask("in progress", chunk=np.zeros((3, 8), np.float32), frozen=2)
        ask("late", deadline_ms=1e-6, request_id=8)
        socket.send(msgpack_numpy.packb({"prompt": "nothing else"}))
        found["refused"] = type(socket.recv()).__name__
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv()
        found["close code"] = closed.value.rcvd.code if closed.value.rcvd else None
        found["other path"] = _first_frame(f"ws://{address}/v1/realtime/robot/openpi")
    return found


def _first_frame(url: str) -> Any:
    with connect(url, max_size=None) as socket:
        return sorted(msgpack_numpy.unpackb(socket.recv()))


@contextmanager
def groot_client(key: str | None, token: str | None) -> Iterator[groot.Client]:
    with groot.running(EchoPolicy(), key) as port:
        client = groot.Client(port, token)
        try:
            yield client
        finally:
            client.close()


def record_groot() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with groot_client("secret", "secret") as client:
        for endpoint in ("ping", "reset", "get_modality_config", "kill"):
            found[endpoint] = shape_of(client.call(endpoint))
        request = groot.batch(observation(), observation())
        found["request"] = shape_of(request)
        actions, info = client.call("get_action", request)
        found["get_action"] = [shape_of(actions), shape_of(info)]
        found["refused"] = shape_of(client.call("get_action", {}))
        client.token = None
        found["without key"] = shape_of(client.call("ping"))
    return found


def record_playground() -> dict[str, Any]:
    """Type of a message -> its keys, for a visit that uses every command."""
    found: dict[str, Any] = {}
    app = create_app(scenes.StillPolicy(), EchoGenerator())
    add_playground(app, scenes.CONTRACT, name="BLM")
    with ExitStack() as opened:
        address = opened.enter_context(running_app(app))
        page = httpx.get(f"http://{address}{PATH}").text
        facts = re.search(r"(\{\"model\".*?\});?\n", page)
        found["facts"] = shape_of(json.loads(facts[1])) if facts else None
        socket = opened.enter_context(connect(f"ws://{address}{PATH}/ws", max_size=None))

        def send(kind: str, **fields: Any) -> None:
            socket.send(json.dumps({"type": kind, **fields}))

        def until(kind: str, label: str, state: str | None = None) -> None:
            while True:
                message = json.loads(socket.recv(timeout=30))
                if message["type"] == kind and state in (None, message.get("state")):
                    found[label] = {"type": kind, "keys": shape_of(message)}
                    return

        scene = {"robot": "panda", "task": "push_cube", "seed": 3, "instruction": "", "models": ["BLM"]}
        send("preview", **scene)
        until("scene", "scene")
        until("questions", "questions")
        until("frame", "frame before a run", "ready")
        send("look", id=1)
        until("look", "look")
        send("start", **scene)
        until("frame", "frame while driving", "driving")
        send("pause", on=True)
        until("frame", "frame in a pause", "paused")
        send("move", object="cube", dx=0.01, dy=0.0)
        until("frame", "frame after a move", "paused")
        send("move", object="moon", dx=0.01, dy=0.0)
        until("error", "wrong object")
        send("stop")
        until("frame", "frame after a stop", "stopped")
        send("dance")
        until("error", "unknown command")
    return found


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "routes": record_routes,
    "missing spaces": record_missing_spaces,
    "streams": record_streams,
    "openpi": record_openpi,
    "groot": record_groot,
    "playground": record_playground,
}


@pytest.mark.parametrize("part", PARTS)
def test_the_wire_has_not_changed(part: str) -> None:
    now = json.loads(json.dumps(PARTS[part]()))
    before = json.loads(RECORD.read_text())[part]
    assert now.keys() == before.keys()
    for name in now:
        assert now[name] == before[name], name


def main() -> None:
    """Record the wire as it is now, an entry a line."""
    parts = [
        f"{json.dumps(part)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in record().items())
        + "\n }"
        for part, record in PARTS.items()
    ]
    RECORD.write_text("{\n " + ",\n ".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
