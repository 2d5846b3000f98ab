"""Routes of actions in the OpenPI form: one websocket a robot."""

from __future__ import annotations

import logging
import time

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse

from blm.serving import wire
from blm.serving.access import require_key
from blm.serving.engine import Engine
from blm.serving.errors import RequestError
from blm.serving.metrics import Metrics
from blm.types import BlmError, LateError, Policy

log = logging.getLogger(__name__)
OPENPI_PATHS = ("/", "/v1/realtime/robot/openpi")
"""OpenPI's own path, and the one that vLLM-Omni serves."""


def add_policy(app: FastAPI, policy: Policy, api_key: str | None) -> None:
    async def openpi(socket: WebSocket) -> None:
        try:
            require_key(socket.headers, api_key)
        except RequestError as error:
            await socket.send_denial_response(JSONResponse(error.to_json(), error.status))
            return
        await socket.accept()
        requests, status = app.state.metrics.requests, "refused"
        try:
            await _converse(socket, policy, app.state.engine, app.state.metrics)
        except WebSocketDisconnect:
            return
        except BlmError as error:
            await _refuse(socket, str(error))
        except Exception as error:
            log.error("the policy failed: %r", error)
            status = "failed"
            await _refuse(socket, f"the policy failed: {error!r}")
        requests.labels("action", status).inc()

    for path in OPENPI_PATHS:
        app.add_api_websocket_route(path, openpi)


async def _converse(socket: WebSocket, policy: Policy, engine: Engine, metrics: Metrics) -> None:
    """Send the contract, then answer observations with chunks until the client leaves."""
    await socket.send_bytes(wire.pack(policy.contract.to_json()))
    previous: dict[str, float] = {}
    while True:
        frame = await socket.receive()
        start = time.monotonic()
        if frame["type"] == "websocket.disconnect":
            return
        request = wire.unpack(frame.get("bytes") or b"")
        observation = wire.to_observation(request, policy.contract)
        try:
            acted = await engine.act(observation, wire.deadline_s(request))
        except LateError as error:
            await socket.send_bytes(
                wire.pack({wire.LATE: str(error), "waited_ms": _milliseconds_since(start)})
            )
            metrics.requests.labels("action", "late").inc()
            continue
        timing = {"infer_ms": _milliseconds_since(start), **previous}
        policy_timing = {"infer_ms": acted.infer_ms, "together": acted.together}
        reply = {"actions": acted.chunk.actions, "policy_timing": policy_timing, "server_timing": timing}
        await socket.send_bytes(wire.pack(reply))
        previous = {"prev_total_ms": _milliseconds_since(start)}
        metrics.requests.labels("action", "ok").inc()
        metrics.action.observe(time.monotonic() - start)
        metrics.infer.observe(acted.infer_ms / 1000)
        metrics.together.observe(acted.together)


async def _refuse(socket: WebSocket, reason: str) -> None:
    """OpenPI's form of an error: a text frame, then close 1011."""
    try:
        await socket.send_text(reason)
        await socket.close(code=1011)
    except (RuntimeError, WebSocketDisconnect):
        log.info("a client left before it could be told: %s", reason)


def _milliseconds_since(start: float) -> float:
    return (time.monotonic() - start) * 1000
