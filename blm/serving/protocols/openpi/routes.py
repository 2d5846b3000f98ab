"""OpenPI's websocket routes: one connection per robot."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from blm.serving.metrics import Metrics
from blm.serving.protocols.disconnect import cancel_on_disconnect
from blm.serving.protocols.openpi import wire
from blm.serving.scheduler import ModelScheduler
from blm.types import BlmError, LateError, Policy, shorten

log = logging.getLogger(__name__)
OPENPI_PATHS = ("/", "/v1/realtime/robot/openpi")
"""OpenPI's own path, and that of vLLM-Omni."""
_LONGEST_ERROR = 1000
"""Maximum length of an error message to a client [characters]."""


def add_policy(app: FastAPI, policy: Policy) -> None:
    """Add OpenPI's routes to an app that has a scheduler, metrics and access control."""

    async def openpi(socket: WebSocket) -> None:
        await socket.accept()  # the access middleware has checked the key
        requests, status = app.state.metrics.requests, "refused"
        try:
            await _serve_connection(socket, policy, app.state.scheduler, app.state.metrics)
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


async def _serve_connection(
    socket: WebSocket, policy: Policy, scheduler: ModelScheduler, metrics: Metrics
) -> None:
    """Send the contract, then reply to observations until the client disconnects.

    A connection has one request in progress at a time. Meanwhile the next message is awaited, which
    shows when the client disconnects; its request is then cancelled.
    """
    contract = policy.contract
    client = f"openpi {socket.client}"
    previous = dict[str, float]()
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
                result = await cancel_on_disconnect(scheduler.act(observation, within_s, client), receiving)
            except LateError as error:
                late = {**echo, wire.LATE: str(error), "waited_ms": _milliseconds_since(start)}
                await socket.send_bytes(wire.pack(late))
                metrics.requests.labels("action", "late").inc()
                continue
            timing = {"infer_ms": _milliseconds_since(start), **previous}
            policy_timing = {"infer_ms": result.infer_ms, "together": result.batch_size}
            reply = {"actions": result.chunk.actions, "policy_timing": policy_timing, "server_timing": timing}
            await socket.send_bytes(wire.pack(echo | reply))
            previous = {"prev_total_ms": _milliseconds_since(start)}
            metrics.requests.labels("action", "ok").inc()
            metrics.action.observe(time.monotonic() - start)
            metrics.infer.observe(result.infer_ms / 1000)
            metrics.action_batch.observe(result.batch_size)
    finally:
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)


async def _receive(socket: WebSocket) -> Mapping[str, Any]:
    """Return the next frame. Raises WebSocketDisconnect when the client has disconnected."""
    frame = await socket.receive()
    if frame["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(frame.get("code", 1006))
    return frame


def _binary(frame: Mapping[str, Any]) -> bytes:
    data = frame.get("bytes")
    if not data:
        kind = "a text frame" if frame.get("text") is not None else "an empty frame"
        raise BlmError(f"received {kind}; send an observation as msgpack in a binary frame")
    return bytes(data)


async def _refuse(socket: WebSocket, reason: str) -> None:
    """Report an error as OpenPI does: a text frame, then close code 1011."""
    try:
        await socket.send_text(reason)
        await socket.close(code=1011)
    except (RuntimeError, WebSocketDisconnect):
        log.info("the client disconnected before it received the error: %s", reason)


def _milliseconds_since(start: float) -> float:
    return (time.monotonic() - start) * 1000
