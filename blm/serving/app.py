"""One process for both spaces: chat in the OpenAI form and actions in the OpenPI form, on one port."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from blm.serving.access import connections
from blm.serving.access.gate import Gate
from blm.serving.access.keys import SECURITY_HEADERS, Access, origin_text
from blm.serving.access.login import add_login
from blm.serving.errors import RequestError
from blm.serving.metrics import Metrics
from blm.serving.protocols.openai.completions import ChatService, add_chat
from blm.serving.protocols.openai.conversation import Limits
from blm.serving.protocols.openai.models import add_models
from blm.serving.protocols.openai.reply import Reasoning
from blm.serving.protocols.openai.tokenizing import add_tokenizing
from blm.serving.protocols.openpi import wire
from blm.serving.protocols.openpi.routes import OPENPI_PATHS, add_policy
from blm.serving.scheduler import Engine, Room, Speaker
from blm.types import Policy

log = logging.getLogger(__name__)
GRACE_S = 4.0
"""What has begun may take this long to end when the server is told to stop."""


def create_app(
    policy: Policy | None = None,
    speaker: Speaker | None = None,
    *,
    name: str = "BLM",
    api_key: str | None = None,
    access: Access | None = None,
    limits: Limits | None = None,
    room: Room | None = None,
    reasoning: Reasoning = "inline",
) -> FastAPI:
    """Build the server around a policy, a speaker, or both; the routes of what is missing say so.

    `api_key` is short for `access=Access([api_key])`. `reasoning`: where thoughts go, into the answer's text
    or apart. The policy must keep no memory between requests: OpenPI has no message for a new episode.
    Raises BlmError for an empty or unprintable key.
    """
    access = access or Access([] if api_key is None else [api_key])
    engine = Engine(policy, speaker, room)
    metrics = Metrics(lambda: engine.waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()
        await run_in_threadpool(engine.join)

    app = FastAPI(title=name, version=version("blm"), docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.engine, app.state.metrics, app.state.access = engine, metrics, access
    app.state.connections = connections.ConnectionTable()
    app.state.serves = ["chat"] * (speaker is not None) + ["actions"] * (policy is not None)
    _add_gate_and_errors(app, access)
    _add_status(app, policy)
    add_models(app, engine, name, app.state.serves)
    add_login(app, access)
    if speaker is not None:
        service = ChatService(
            name=name,
            engine=engine,
            metrics=metrics,
            limits=limits or Limits(),
            reasoning=reasoning,
            fingerprint=None if policy is None else policy.contract.revision,
        )
        app.state.chat = service
        add_chat(app, service)
        if (tokenizer := getattr(speaker, "tokenizer", None)) is not None:
            add_tokenizing(app, service, tokenizer)
    else:
        app.add_api_route("/v1/chat/completions", _no_chat, methods=["POST"], include_in_schema=False)
    if policy is not None:
        add_policy(app, policy)
    else:
        for path in OPENPI_PATHS:
            app.add_api_websocket_route(path, _no_policy)
    return app


def _add_gate_and_errors(app: FastAPI, access: Access) -> None:
    app.router.default = _not_found
    app.add_exception_handler(RequestError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(ClientDisconnect, _on_leaving)
    app.add_exception_handler(Exception, _on_error)
    if access.trust.origins:
        origins = [origin_text(origin) for origin in access.trust.origins]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(Gate, access=access)  # added last: it comes first


class Server(uvicorn.Server):
    """Told to stop, it takes nothing new and lets what has begun come to its end, for GRACE_S at most."""

    async def shutdown(self, sockets: Any = None) -> None:
        app: Any = self.config.app
        app.state.engine.close(GRACE_S - 1)
        await super().shutdown(sockets)


def server_config(app: FastAPI, host: str = "127.0.0.1", port: int = 8000) -> uvicorn.Config:
    """The uvicorn settings that OpenPI clients need, with our connections.

    Frames may be as large as the contract's observations, and are not compressed. What a proxy claims in
    X-Forwarded-* is not believed: the client could have written it.
    """
    policy = app.state.engine.policy
    return uvicorn.Config(
        app,
        host,
        port,
        http=connections.HttpProtocol,
        ws=connections.WebSocketProtocol,
        ws_max_size=wire.SMALLEST_LIMIT if policy is None else wire.frame_limit(policy.contract),
        ws_per_message_deflate=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=int(connections.KEEP_ALIVE_S),
        timeout_graceful_shutdown=int(GRACE_S),
    )


def serve(
    app: FastAPI, host: str = "127.0.0.1", port: int = 8000, sockets: list[socket.socket] | None = None
) -> None:
    """Run until interrupted, on `sockets` if they are given (`blm.addresses.bind`).

    `host='0.0.0.0'` opens the server to the network: give `create_app` keys then.
    """
    _allow_files(2 * connections.MAX_CONNECTIONS)
    with suppress(KeyboardInterrupt):  # after a clean end
        Server(server_config(app, host, port)).run(sockets)


def _allow_files(most: int) -> None:
    """Raise this process's own limit on open files, where the system lets it: each connection is one."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most if hard < 0 else min(most, hard), hard))


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer for paths without a route; Starlette's own answer to a websocket says nothing."""
    error = RequestError(404, f"no such path: {scope['path'][:200]}")
    await JSONResponse(error.to_json(), error.status)(scope, receive, send)


async def _no_chat() -> Response:
    raise RequestError(
        404, "this checkpoint has no chat, only actions: ask on the websocket at /", code="no_chat"
    )


async def _no_policy(socket: WebSocket) -> None:
    message = (
        "this checkpoint has no policy, only chat: ask at /v1/chat/completions, or serve one of Stage II"
    )
    error = RequestError(404, message, code="no_policy")
    await socket.send_denial_response(JSONResponse(error.to_json(), error.status))


async def _on_leaving(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_error(request: Request, error: Exception) -> Response:
    headers = dict[str, str]()
    if isinstance(error, HTTPException):  # no such route or method
        headers |= error.headers or {}
        error = RequestError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")
    if not isinstance(error, RequestError):  # the server logs it; this answer passes no other middleware
        headers |= SECURITY_HEADERS
        error = RequestError(500, "the server failed to answer; its log says why")
    if error.status == 503:
        headers["Retry-After"] = "1"
    return JSONResponse(error.to_json(), error.status, headers)


def _add_status(app: FastAPI, policy: Policy | None) -> None:
    serves: list[str] = app.state.serves
    contract = policy.contract.to_json() if policy is not None else None
    about = {"version": version("blm"), "serves": serves, "chat": "chat" in serves, "policy": contract}

    @app.get("/ping", response_class=PlainTextResponse)
    @app.get("/healthz", response_class=PlainTextResponse)
    @app.get("/health", response_class=PlainTextResponse)
    async def health(request: Request) -> Response:
        found = app.state.engine.health()
        if found.status == "ok":
            return PlainTextResponse("OK\n")
        if found.status == "failed":  # why is for those who may use the model
            why = f": {found.reason}" if app.state.access.is_signed_in(request) else ""
            return PlainTextResponse(f"the model failed{why}\n", 500)
        return PlainTextResponse(f"{found.status}\n", 503, {"Retry-After": "1"})

    @app.get("/version")
    async def get_version() -> dict[str, Any]:
        return about

    @app.get("/metrics", response_class=PlainTextResponse)
    async def get_metrics() -> Response:
        return Response(app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)
