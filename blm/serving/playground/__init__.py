"""One page to watch a served model drive a simulated robot, disturb it, and ask about what it sees.

Everything goes through the protocols that any client uses: the simulated robot asks for actions over OpenPI's
websocket, the page asks questions over chat completions.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import HTMLResponse

from blm.robots import ROBOTS
from blm.serving.playground.rollout import Rollout, Scene
from blm.tasks import TASKS
from blm.types import BlmError, PolicyContract

log = logging.getLogger(__name__)
MOST_VISITORS = 4
"""Visitors at a time; each needs a simulator."""
FRAMES_WAITING = 20
"""Pictures that a slow browser is behind, before newer ones are left out."""
PATH = "/playground"


def add_playground(
    app: FastAPI,
    contract: PolicyContract,
    *,
    name: str,
    api_key: str | None = None,
    beside: Mapping[str, str] | None = None,
) -> None:
    """Add the page to a server. `beside`: name -> ws:// address of other servers to compare with."""
    others = dict(beside or {})
    robots = [robot for robot in contract.action_spaces if robot in ROBOTS]
    facts = {
        "model": name,
        "models": [name, *others],
        "revision": contract.revision,
        "robots": robots,
        "tasks": {task: spec.title for task, spec in TASKS.items()},
        "cameras": list(contract.cameras),
        "key": api_key is not None,
    }
    page = files(__package__).joinpath("page.html").read_text("utf-8")
    page = page.replace("{{FACTS}}", json.dumps(facts).replace("<", "\\u003c"))
    visitors = set[WebSocket]()

    @app.get(PATH)
    async def get_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-store"})

    async def talk(socket: WebSocket) -> None:
        if not same_origin(socket):
            await socket.close(code=1008)
            return
        await socket.accept()
        if len(visitors) >= MOST_VISITORS:
            await socket.send_json({"type": "error", "message": f"{MOST_VISITORS} visitors are here already"})
            await socket.close(code=1013)
            return
        visitors.add(socket)
        host, port = socket.scope["server"]
        try:
            await Visit(socket, {name: f"ws://{host}:{port}", **others}, api_key).run()
        except WebSocketDisconnect:
            pass
        finally:
            visitors.discard(socket)

    app.add_api_websocket_route(f"{PATH}/ws", talk)


POLICY = "default-src 'self'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def read_beside(entries: Sequence[str]) -> dict[str, str]:
    """Read NAME=ws://HOST:PORT. Raises BlmError for anything else, and for a name given twice."""
    found = dict[str, str]()
    for entry in entries:
        name, _, address = entry.partition("=")
        if not name or name in found or not address.startswith(("ws://", "wss://")):
            raise BlmError(f"'{entry}' is not of the form NAME=ws://HOST:PORT with a name of its own")
        found[name] = address
    return found


def same_origin(socket: WebSocket) -> bool:
    """Whether a page of this server opened the socket: other pages of a visitor's browser must not."""
    origin = socket.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == socket.headers.get("host")


class Visit:
    """One browser and the robots that it watches."""

    def __init__(self, socket: WebSocket, models: Mapping[str, str], api_key: str | None) -> None:
        self.socket, self.models, self.api_key = socket, models, api_key
        self.loop = asyncio.get_running_loop()
        self.news: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.rollouts = list[Rollout]()

    async def run(self) -> None:
        sending = asyncio.create_task(self._send())
        try:
            if self.api_key is not None:
                await self._require_key()
            while True:
                self._obey(await self._receive())
        finally:
            self._stop()
            sending.cancel()

    async def _receive(self) -> Mapping[str, Any]:
        try:
            command = json.loads(await self.socket.receive_text())
        except (ValueError, KeyError):
            return {}
        return command if isinstance(command, dict) else {}

    async def _require_key(self) -> None:
        given = str((await self._receive()).get("key"))
        if not hmac.compare_digest(given.encode(), str(self.api_key).encode()):
            await self.socket.send_json({"type": "error", "message": "wrong or missing API key"})
            raise WebSocketDisconnect(1008)

    def _obey(self, command: Mapping[str, Any]) -> None:
        kind = command.get("type")
        if kind == "start":
            try:
                self._start(command)
            except BlmError as error:
                self._tell({"type": "error", "message": str(error)})
        elif kind == "stop":
            self._stop()
        else:
            chosen = command.get("side")
            for side, rollout in enumerate(self.rollouts):
                if chosen in (None, side):
                    rollout.commands.put(command if "type" in command else {"type": "nothing"})

    def _start(self, command: Mapping[str, Any]) -> None:
        self._stop()
        scene, names = Scene.read(command), command.get("models") or list(self.models)[:1]
        if not isinstance(names, list) or not 1 <= len(names) <= 2 or not set(names) <= set(self.models):
            raise BlmError(f"models {names}: choose one or two of {', '.join(self.models)}")
        for side, model in enumerate(names):

            def tell(message: dict[str, Any], side: int = side) -> None:
                self.loop.call_soon_threadsafe(self._tell, {**message, "side": side})

            self.rollouts.append(Rollout(scene, self.models[model], self.api_key, tell))
            self.rollouts[-1].start()

    def _stop(self) -> None:
        for rollout in self.rollouts:
            rollout.stop()
        self.rollouts = []

    def _tell(self, message: dict[str, Any]) -> None:
        behind = self.news.qsize() > FRAMES_WAITING
        if not (behind and message["type"] == "frame" and not message.get("over")):
            self.news.put_nowait(message)

    async def _send(self) -> None:
        while True:
            await self.socket.send_json(await self.news.get())
