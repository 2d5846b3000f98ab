"""The server: OpenAI chat completions and OpenPI actions from one process, on one port."""

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
from blm.serving.access.keys import SECURITY_HEADERS, AccessControl, origin_text
from blm.serving.access.login import add_login
from blm.serving.access.middleware import AccessMiddleware
from blm.serving.errors import RequestError
from blm.serving.metrics import Metrics
from blm.serving.protocols.openai.completions import ChatService, add_chat
from blm.serving.protocols.openai.conversation import ChatLimits
from blm.serving.protocols.openai.models import add_models
from blm.serving.protocols.openai.reply import Reasoning
from blm.serving.protocols.openai.tokenizing import add_tokenizing
from blm.serving.protocols.openpi import wire
from blm.serving.protocols.openpi.routes import OPENPI_PATHS, add_policy
from blm.serving.scheduler import ModelScheduler, SchedulerLimits, TokenGenerator
from blm.types import Policy

log = logging.getLogger(__name__)
GRACE_S = 4.0
"""Grace period at shutdown: how long requests in progress may take to finish [s]."""


def create_app(
    policy: Policy | None = None,
    generator: TokenGenerator | None = None,
    *,
    name: str = "BLM",
    api_key: str | None = None,
    access: AccessControl | None = None,
    chat_limits: ChatLimits | None = None,
    scheduler_limits: SchedulerLimits | None = None,
    reasoning: Reasoning = "inline",
) -> FastAPI:
    """Build the server for a policy, a generator, or both.

    Routes of the missing one return an error. `api_key` is short for
    `access=AccessControl([api_key])`. `reasoning` says where to put the text between <think> and
    </think>: in the content of the answer, or in `reasoning_content`. The policy must be stateless,
    because OpenPI has no message for the start of an episode. Raises BlmError for an empty or
    unprintable key.
    """
    access = access or AccessControl([] if api_key is None else [api_key])
    scheduler = ModelScheduler(policy, generator, scheduler_limits)
    metrics = Metrics(lambda: scheduler.waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        scheduler.close()
        await run_in_threadpool(scheduler.join)

    app = FastAPI(title=name, version=version("blm"), docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.scheduler = scheduler
    app.state.metrics = metrics
    app.state.access = access
    app.state.connections = connections.ConnectionTable()
    app.state.serves = ["chat"] * (generator is not None) + ["actions"] * (policy is not None)
    _add_middleware(app, access)
    _add_status(app, policy)
    add_models(app, scheduler, name, app.state.serves)
    add_login(app, access)
    if generator is not None:
        service = ChatService(
            name=name,
            scheduler=scheduler,
            metrics=metrics,
            limits=chat_limits or ChatLimits(),
            reasoning=reasoning,
            fingerprint=None if policy is None else policy.contract.revision,
        )
        _add_chat_service(app, service, getattr(generator, "tokenizer", None))
    else:
        app.add_api_route("/v1/chat/completions", _no_chat, methods=["POST"], include_in_schema=False)
    if policy is not None:
        add_policy(app, policy)
    else:
        for path in OPENPI_PATHS:
            app.add_api_websocket_route(path, _no_policy)
    return app


def _add_chat_service(app: FastAPI, service: ChatService, tokenizer: Any) -> None:
    """Add the routes of chat, and those of its tokenizer unless that is None."""
    app.state.chat = service
    add_chat(app, service)
    if tokenizer is not None:
        add_tokenizing(app, service, tokenizer)


def _add_middleware(app: FastAPI, access: AccessControl) -> None:
    """Add error handlers, access control, and CORS headers for the allowed origins."""
    app.router.default = _not_found
    app.add_exception_handler(RequestError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_error)
    if access.host_policy.origins:
        origins = [origin_text(origin) for origin in access.host_policy.origins]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(AccessMiddleware, access=access)  # added last, so that it runs first


class Server(uvicorn.Server):
    """At shutdown it refuses new requests and lets those in progress finish for up to GRACE_S."""

    async def shutdown(self, sockets: Any = None) -> None:
        app: Any = self.config.app
        app.state.scheduler.close(GRACE_S - 1)
        await super().shutdown(sockets)


def server_config(app: FastAPI, host: str = "127.0.0.1", port: int = 8000) -> uvicorn.Config:
    """Return uvicorn's settings for OpenPI clients, with limits on connections.

    Websocket frames may be as large as the contract's observations and are not compressed.
    X-Forwarded-* headers are ignored, because any client can send them.
    """
    policy = app.state.scheduler.policy
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

    `host='0.0.0.0'` exposes the server to the network; give `create_app` API keys then.
    """
    _raise_file_limit(2 * connections.MAX_CONNECTIONS)
    with suppress(KeyboardInterrupt):  # raised after a clean shutdown
        Server(server_config(app, host, port)).run(sockets)


def _raise_file_limit(most: int) -> None:
    """Raise the limit on open files if permitted: each connection needs a descriptor."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most if hard < 0 else min(most, hard), hard))


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """Reply on paths without a route; Starlette's reply to a websocket has no message."""
    error = RequestError(404, f"no such path: {scope['path'][:200]}")
    await JSONResponse(error.to_json(), error.status)(scope, receive, send)


async def _no_chat() -> Response:
    raise RequestError(
        404, "this checkpoint has no chat, only actions: connect to the websocket at /", code="no_chat"
    )


async def _no_policy(socket: WebSocket) -> None:
    message = (
        "this checkpoint has no policy, only chat: use /v1/chat/completions, or serve a Stage II checkpoint"
    )
    error = RequestError(404, message, code="no_policy")
    await socket.send_denial_response(JSONResponse(error.to_json(), error.status))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # for the log: the client has disconnected


async def _on_error(request: Request, error: Exception) -> Response:
    headers = dict[str, str]()
    if isinstance(error, HTTPException):  # no such route or method
        headers |= error.headers or {}
        error = RequestError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")
    if not isinstance(error, RequestError):  # uvicorn logs it; this response passes no other middleware
        headers |= SECURITY_HEADERS
        error = RequestError(500, "internal server error; see the server's log")
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
        found = app.state.scheduler.health()
        if found.status == "ok":
            return PlainTextResponse("OK\n")
        if found.status == "failed":  # the reason is shown to clients with a key only
            reason = f": {found.reason}" if app.state.access.is_signed_in(request) else ""
            return PlainTextResponse(f"the model failed{reason}\n", 500)
        return PlainTextResponse(f"{found.status}\n", 503, {"Retry-After": "1"})

    @app.get("/version")
    async def get_version() -> dict[str, Any]:
        return about

    @app.get("/metrics", response_class=PlainTextResponse)
    async def get_metrics() -> Response:
        return Response(app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)
