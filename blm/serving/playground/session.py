"""A visitor's websocket: receives commands, runs rollouts, sends messages; queues are bounded."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import reprlib
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from blm.serving.access.rate_limit import TokenBucket
from blm.serving.playground.rollout import DRIVING, Rollout, SceneRequest, ServedModel
from blm.types import BlmError

MAX_ROLLOUTS = 8
"""Maximum number of simulators of all visitors; each is a thread with an OpenGL context."""
MAX_COMMAND_CHARS = 4096
MAX_WAITING_MESSAGES = 32
"""Maximum number of queued messages other than frames.

A browser that falls further behind is disconnected.
"""
SEND_TIMEOUT_S = 20.0
"""Timeout of a message to a browser that does not read [s]; then it is disconnected."""
GOODBYE_S = 1.0
"""Timeout of the close frame with its reason [s]."""
IDLE_S = 600.0
"""Idle timeout: a visitor without commands or a running rollout is disconnected [s]."""
CLOSE_TIMEOUT_S = 5.0
"""Maximum time that a new scene waits for the previous one to close [s]."""
STARTS_PER_S, STARTS_AT_ONCE = 2.0, 8
"""Rate limit of new scenes: sustained rate [1/s] and burst."""
COMMANDS_PER_S, COMMANDS_AT_ONCE = 40.0, 80
"""Rate limit of commands: sustained rate [1/s] and burst."""


class CloseError(Exception):
    """Closes the connection, with a websocket close code and a reason that the page shows."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class MessageQueue:
    """Messages for one browser: the newest frame of each side, and a bounded number of others."""

    def __init__(self) -> None:
        self._frames = dict[int, dict[str, Any]]()
        self._others = deque[dict[str, Any]]()
        self._filled = asyncio.Event()
        self.overflowed = False

    def put(self, message: dict[str, Any]) -> None:
        side = message.get("side", 0)
        if message["type"] == "frame":
            self._frames[side] = message
        elif message["type"] == "error" and message in self._others:
            pass  # a flood of wrong commands receives one error at a time
        elif len(self._others) < MAX_WAITING_MESSAGES:
            if message["type"] == "scene":
                self._frames.pop(side, None)  # it shows the previous scene
            self._others.append(message)
        else:
            self.overflowed = True
        self._filled.set()

    async def get(self) -> dict[str, Any]:
        """Return the next message. Raises CloseError when the browser is too far behind."""
        while True:
            if self.overflowed:
                raise CloseError(1008, "the browser is too slow to keep up")
            if self._others:
                return self._others.popleft()
            if self._frames:
                return self._frames.pop(next(iter(self._frames)))
            self._filled.clear()
            await self._filled.wait()


class Simulators:
    """The running simulators of all visitors."""

    def __init__(self) -> None:
        self.running = set[Rollout]()

    def check_room(self, count: int) -> None:
        """Raise BlmError unless `count` more simulators may run."""
        if len(self.running) + count > MAX_ROLLOUTS:
            raise BlmError(
                f"{len(self.running)} of at most {MAX_ROLLOUTS} simulators are running; try again in a moment"
            )


class VisitorSession:
    """One visitor, with at most one scene, and a simulator for each of one or two models."""

    def __init__(self, socket: WebSocket, models: Mapping[str, ServedModel], simulators: Simulators) -> None:
        self.socket, self.models, self.simulators = socket, models, simulators
        self.loop = asyncio.get_running_loop()
        self.message_queue = MessageQueue()
        self.rollouts = list[Rollout]()
        self.chosen: tuple[SceneRequest, list[str]] | None = None
        self._starts = TokenBucket(STARTS_PER_S, STARTS_AT_ONCE)
        self._commands = TokenBucket(COMMANDS_PER_S, COMMANDS_AT_ONCE)
        self._active_at = time.monotonic()
        self._some_closed = asyncio.Event()
        self._leave: CloseError | None = None
        self._close_requested = asyncio.Event()

    @property
    def idle_s(self) -> float:
        """Time since the last command; 0 while a model controls the robot [s]."""
        driving = any(rollout.state in DRIVING for rollout in self.rollouts)
        return 0.0 if driving else time.monotonic() - self._active_at

    def request_close(self, code: int, reason: str) -> None:
        self._leave = CloseError(code, reason)
        self._close_requested.set()

    async def run(self) -> None:
        """Serve until the browser disconnects or is disconnected; then close all rollouts."""
        tasks = [
            asyncio.create_task(work)
            for work in (self._send(), self._receive(), self._wait_for_close_request())
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except CloseError as error:
            with suppress(RuntimeError, WebSocketDisconnect, TimeoutError):
                # a browser that does not read will not receive this message either
                async with asyncio.timeout(GOODBYE_S):
                    await self.socket.close(error.code, error.reason)
        except WebSocketDisconnect:
            pass
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._close_scene()

    async def _wait_for_close_request(self) -> None:
        await self._close_requested.wait()
        assert self._leave is not None
        raise self._leave

    async def _send(self) -> None:
        while True:
            message = await self.message_queue.get()
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await self.socket.send_json(message)
            except TimeoutError:
                raise CloseError(1008, "the browser does not read its messages") from None

    async def _receive(self) -> None:
        while True:
            try:
                async with asyncio.timeout(max(1.0, IDLE_S - self.idle_s)):
                    message = await self.socket.receive()
            except TimeoutError:
                if self.idle_s >= IDLE_S:
                    raise CloseError(1000, f"closed after {IDLE_S / 60:.0f} minutes without use") from None
                continue
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1005))
            self._active_at = time.monotonic()
            if wait_s := self._commands.try_take():
                await asyncio.sleep(wait_s)  # reading stops meanwhile, so a flood waits in the browser
            try:
                await self._handle_command(read_command(message.get("text")))
            except BlmError as error:
                self.message_queue.put({"type": "error", "message": str(error)})

    async def _handle_command(self, command: Mapping[str, Any]) -> None:
        kind = command.get("type")
        if kind in ("start", "preview"):
            await self._open_scene(command, drive=kind == "start")
        elif kind in ("pause", "stop", "look", "move", "light"):
            side = command.get("side")
            for index, rollout in enumerate(self.rollouts):
                if side is None or side == index:
                    rollout.send(command)
        else:
            raise BlmError(
                f"unknown command {reprlib.repr(kind)}; valid: start, preview, pause, stop, look, move, light"
            )

    async def _open_scene(self, command: Mapping[str, Any], *, drive: bool) -> None:
        """Show a scene, unless it is shown already, and with `drive` start the models."""
        scene, names = SceneRequest.read(command), self._model_names(command)
        shown = self.rollouts and self.chosen == (scene, names)
        if shown and drive and all(rollout.state == "ready" for rollout in self.rollouts):
            for rollout in self.rollouts:
                rollout.send({"type": "drive"})
            return
        if self._starts.try_take():
            raise BlmError("too many scenes in a short time; wait a second")
        if not await self._close_scene():
            raise BlmError("the previous run still waits for its model; try again in a few seconds")
        self.simulators.check_room(len(names))
        self.chosen = scene, names
        for side, name in enumerate(names):
            self._start_rollout(side, Rollout(scene, self.models[name], drive=drive))

    def _start_rollout(self, side: int, rollout: Rollout) -> None:
        def notify(message: dict[str, Any]) -> None:  # in the rollout's thread
            with suppress(RuntimeError):  # the event loop is closed: the server is shutting down
                self.loop.call_soon_threadsafe(self._deliver, rollout, {**message, "side": side})

        rollout.notify = notify
        self.rollouts.append(rollout)
        self.simulators.running.add(rollout)
        rollout.start()

    def _deliver(self, rollout: Rollout, message: dict[str, Any]) -> None:
        if message["type"] == "closed":
            rollout.join(1.0)  # returns at once: this was the thread's last statement
            self.simulators.running.discard(rollout)
            self._some_closed.set()
        elif rollout in self.rollouts:
            self.message_queue.put(message)

    async def _close_scene(self) -> bool:
        """End the threads of the scene.

        Returns False if one still runs after CLOSE_TIMEOUT_S.
        """
        for rollout in self.rollouts:
            rollout.request_close()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                while self.simulators.running.intersection(self.rollouts):
                    self._some_closed.clear()
                    await self._some_closed.wait()
        self.rollouts = [rollout for rollout in self.rollouts if rollout in self.simulators.running]
        return not self.rollouts

    def _model_names(self, command: Mapping[str, Any]) -> list[str]:
        names = command.get("models") or list(self.models)[:1]
        known = isinstance(names, list) and all(isinstance(n, str) and n in self.models for n in names)
        if not known or len(names) > 2:
            raise BlmError(f"models {reprlib.repr(names)}: choose one or two of {', '.join(self.models)}")
        return names


def read_command(text: str | None) -> dict[str, Any]:
    """Parse a command. Raises BlmError if it is invalid, and CloseError if it is too long."""
    if text is None:
        raise BlmError("a command is a text frame with a JSON object")
    if len(text) > MAX_COMMAND_CHARS:
        raise CloseError(1009, f"a command has at most {MAX_COMMAND_CHARS} characters")
    try:
        command = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BlmError(f"a command is a JSON object: {str(error)[:80]}") from error
    if not isinstance(command, dict):
        raise BlmError(f"a command is a JSON object, got {reprlib.repr(command)}")
    return command


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def own_address(server: tuple[str, int | None] | None) -> str | None:
    """Return the ws:// address at which a server reaches itself, from `scope["server"]`.

    Unspecified and link-local addresses are reached through loopback. None for a Unix socket.
    """
    if server is None or server[1] is None:
        return None
    host, port = server
    try:
        address = ipaddress.ip_address(host or "0.0.0.0")
    except ValueError:
        return f"ws://{host}:{port}"
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        if mapped is None:
            loopback = address.is_unspecified or address.is_link_local
            return f"ws://[{'::1' if loopback else address}]:{port}"
        address = mapped
    return f"ws://{'127.0.0.1' if address.is_unspecified else address}:{port}"
