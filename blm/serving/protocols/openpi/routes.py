"""Routes of actions in the OpenPI form: one websocket a robot."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from blm.serving.metrics import Metrics
from blm.serving.protocols.openpi import wire
from blm.serving.protocols.peers import while_connected
from blm.serving.scheduler import Engine
from blm.types import BlmError, LateError, Policy, shorten

log = logging.getLogger(__name__)
OPENPI_PATHS = ("/", "/v1/realtime/robot/openpi")
"""OpenPI's own path, and the one that vLLM-Omni serves."""
_LONGEST_ERROR = 1000
"""Characters of an error that a client is told."""


def add_policy(app: FastAPI, policy: Policy) -> None:
    """Add OpenPI's routes to an app that has an engine, metrics and, before all routes, a gate."""

    async def openpi(socket: WebSocket) -> None:
        await socket.accept()  # the gate has asked for the key
        requests, status = app.state.metrics.requests, "refused"
        try:
            await _converse(socket, policy, app.state.engine, app.state.metrics)
        except WebSocketDisconnect:
            return
        except BlmError as error:
            await _refuse(socket, shorten(error, _LONGEST_ERROR))
        except Exception as error:
            reason = f"the policy failed: {type(error).__name__}: {shorten(error, _LONGEST_ERROR)}"
            log.error(reason)
            status = "failed"
            await _refuse(socket, reason)
        requests.labels("action", status).inc()

    for path in OPENPI_PATHS:
        app.add_api_websocket_route(path, openpi)


async def _converse(socket: WebSocket, policy: Policy, engine: Engine, metrics: Metrics) -> None:
    """Send the contract, then answer observations with chunks until the client leaves.

    One request of a socket is worked on at a time. The next one is awaited meanwhile: that shows when the
    client has gone, and its request then leaves the engine.
    """
    contract, previous, client = policy.contract, dict[str, float](), f"openpi {socket.client}"
    await socket.send_bytes(wire.pack(contract.to_json()))
    receiving = asyncio.create_task(_receive(socket))
    try:
        while True:
            frame = await receiving
            start = time.monotonic()
            receiving = asyncio.create_task(_receive(socket))
            request = wire.unpack(_binary(frame), wire.item_limit(contract))
            observation, echo = wire.to_observation(request, contract), wire.echo(request)
            within_s = wire.deadline_s(request)
            try:
                acted = await while_connected(engine.act(observation, within_s, client), receiving)
            except LateError as error:
                late = {**echo, wire.LATE: str(error), "waited_ms": _milliseconds_since(start)}
                await socket.send_bytes(wire.pack(late))
                metrics.requests.labels("action", "late").inc()
                continue
            timing = {"infer_ms": _milliseconds_since(start), **previous}
            policy_timing = {"infer_ms": acted.infer_ms, "together": acted.together}
            reply = {"actions": acted.chunk.actions, "policy_timing": policy_timing, "server_timing": timing}
            await socket.send_bytes(wire.pack(echo | reply))
            previous = {"prev_total_ms": _milliseconds_since(start)}
            metrics.requests.labels("action", "ok").inc()
            metrics.action.observe(time.monotonic() - start)
            metrics.infer.observe(acted.infer_ms / 1000)
            metrics.together.observe(acted.together)
    finally:
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)


async def _receive(socket: WebSocket) -> Mapping[str, Any]:
    """Return the next frame. Raises WebSocketDisconnect when there will be none."""
    frame = await socket.receive()
    if frame["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(frame.get("code", 1006))
    return frame


def _binary(frame: Mapping[str, Any]) -> bytes:
    data = frame.get("bytes")
    if not data:
        what = "a text frame" if frame.get("text") is not None else "an empty frame"
        raise BlmError(f"this is {what}; send an observation as msgpack in a binary frame")
    return bytes(data)


async def _refuse(socket: WebSocket, reason: str) -> None:
    """OpenPI's form of an error: a text frame, then close 1011."""
    try:
        await socket.send_text(reason)
        await socket.close(code=1011)
    except (RuntimeError, WebSocketDisconnect):
        log.info("a client left before it could be told: %s", reason)


def _milliseconds_since(start: float) -> float:
    return (time.monotonic() - start) * 1000
