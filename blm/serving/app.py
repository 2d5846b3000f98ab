"""One process for both spaces: chat in the OpenAI form and actions in the OpenPI form, on one port."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from blm.serving import wire
from blm.serving.batching import BusyError, ModelThread, Priority
from blm.serving.chat import Limits, RequestError, complete, parse_request
from blm.serving.client import MAX_FRAME
from blm.types import BlmError, Chat, Observation, Policy

log = logging.getLogger(__name__)
OPENPI_PATHS = ("/", "/v1/realtime/robot/openpi")
"""OpenPI's own path, and the one that vLLM-Omni serves."""


def create_app(
    policy: Policy | None = None,
    chat: Chat | None = None,
    *,
    name: str = "BLM",
    api_key: str | None = None,
    limits: Limits | None = None,
) -> FastAPI:
    """Build the server around a policy, a chat, or both; what is missing is not routed.

    The policy must keep no memory between requests: OpenPI has no message for a new episode.
    """
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.model = ModelThread(limits.waiting)
        yield
        app.state.model.close()

    app = FastAPI(title=name, openapi_url=None, lifespan=lifespan)
    app.add_exception_handler(RequestError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    _add_status(app, policy, chat, name, api_key)
    if chat is not None:
        _add_chat(app, chat, name, api_key, limits)
    if policy is not None:
        _add_policy(app, policy, api_key)
    return app


def server_config(app: FastAPI, host: str = "127.0.0.1", port: int = 8000) -> uvicorn.Config:
    """The uvicorn settings that OpenPI clients need: large frames, no compression."""
    return uvicorn.Config(
        app, host, port, ws="websockets-sansio", ws_max_size=MAX_FRAME, ws_per_message_deflate=False
    )


def serve(app: FastAPI, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Run until interrupted. `host='0.0.0.0'` opens the server to the network: set an api_key then."""
    uvicorn.Server(server_config(app, host, port)).run()


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # no such route or method
        error = RequestError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    assert isinstance(error, RequestError)
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(error.to_json(), error.status, headers)


def _add_status(
    app: FastAPI, policy: Policy | None, chat: Chat | None, name: str, api_key: str | None
) -> None:
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "blm"}
    contract = policy.contract.to_json() if policy is not None else None
    about = {"version": version("blm"), "decoding": "greedy", "chat": chat is not None, "policy": contract}

    @app.get("/healthz")
    @app.get("/health")
    async def health() -> Response:
        return PlainTextResponse("OK\n")

    @app.get("/version")
    async def get_version() -> dict[str, Any]:
        return about

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _require_key(request.headers, api_key)
        return {"object": "list", "data": [model]}


def _add_chat(app: FastAPI, chat: Chat, name: str, api_key: str | None, limits: Limits) -> None:
    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        _require_key(request.headers, api_key)
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > limits.body_bytes:
                raise RequestError(413, f"the request body is larger than {limits.body_bytes} bytes")
        asked, messages = await run_in_threadpool(parse_request, bytes(body), limits)
        if asked.model != name:
            message = f"the model '{asked.model}' does not exist; this server has '{name}'"
            raise RequestError(404, message, "model", "model_not_found")
        try:
            done = await app.state.model.run(partial(complete, chat, asked, messages), Priority.CHAT)
        except BlmError as error:
            raise RequestError(503 if isinstance(error, BusyError) else 400, str(error)) from error
        except Exception as error:
            log.exception("the chat failed")
            raise RequestError(500, f"the chat failed: {error!r}") from error
        if not asked.stream:
            return JSONResponse(done.to_json())
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(done.events(usage), media_type="text/event-stream")


def _add_policy(app: FastAPI, policy: Policy, api_key: str | None) -> None:
    async def openpi(socket: WebSocket) -> None:
        try:
            _require_key(socket.headers, api_key)
        except RequestError as error:
            await socket.send_denial_response(JSONResponse(error.to_json(), error.status))
            return
        await socket.accept()
        try:
            await _converse(socket, policy, app.state.model)
        except WebSocketDisconnect:
            return
        except BlmError as error:
            await _refuse(socket, str(error))
        except Exception as error:
            log.exception("the policy failed")
            await _refuse(socket, f"the policy failed: {error!r}")

    for path in OPENPI_PATHS:
        app.add_api_websocket_route(path, openpi)


async def _converse(socket: WebSocket, policy: Policy, model: ModelThread) -> None:
    """Send the contract, then answer observations with chunks until the client leaves."""
    await socket.send_bytes(wire.pack(policy.contract.to_json()))
    previous: dict[str, float] = {}
    while True:
        frame = await socket.receive()
        start = time.monotonic()
        if frame["type"] == "websocket.disconnect":
            return
        observation = wire.to_observation(wire.unpack(frame.get("bytes") or b""), policy.contract)
        actions, infer_ms = await model.run(partial(_act, policy, observation), Priority.CONTROL)
        timing = {"infer_ms": _milliseconds_since(start), **previous}
        reply = {"actions": actions, "policy_timing": {"infer_ms": infer_ms}, "server_timing": timing}
        await socket.send_bytes(wire.pack(reply))
        previous = {"prev_total_ms": _milliseconds_since(start)}


def _act(policy: Policy, observation: Observation) -> tuple[Any, float]:
    start = time.monotonic()
    return policy.act(observation).actions, _milliseconds_since(start)


async def _refuse(socket: WebSocket, reason: str) -> None:
    """OpenPI's form of an error: a text frame, then close 1011."""
    try:
        await socket.send_text(reason)
        await socket.close(code=1011)
    except (RuntimeError, WebSocketDisconnect):
        log.info("a client left before it could be told: %s", reason)


def _require_key(headers: Mapping[str, str], api_key: str | None) -> None:
    """OpenAI clients send 'Bearer <key>', OpenPI clients 'Api-Key <key>'."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    known = scheme.lower() in ("bearer", "api-key")
    if api_key is not None and not (known and hmac.compare_digest(given.encode(), api_key.encode())):
        raise RequestError(401, "wrong or missing API key", code="invalid_api_key")


def _milliseconds_since(start: float) -> float:
    return (time.monotonic() - start) * 1000
