"""One process for both spaces: chat in the OpenAI form and actions in the OpenPI form, on one port."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from blm.serving import access
from blm.serving.access import require_key
from blm.serving.chat import Limits
from blm.serving.client import MAX_FRAME
from blm.serving.completions import ChatService, add_chat
from blm.serving.engine import Engine, Room, Speaker
from blm.serving.errors import RequestError
from blm.serving.metrics import Metrics
from blm.serving.models import add_models
from blm.serving.openai_reply import Reasoning
from blm.serving.openpi import add_policy
from blm.serving.tokenizing import add_tokenizing
from blm.types import Policy

log = logging.getLogger(__name__)
GRACE_S = 4.0
"""What has begun may take this long to end when the server is told to stop."""
MOST_CONNECTIONS = 1000
"""Further ones get status 503; each may hold a request body."""


def create_app(
    policy: Policy | None = None,
    speaker: Speaker | None = None,
    *,
    name: str = "BLM",
    api_key: str | None = None,
    limits: Limits | None = None,
    room: Room | None = None,
    reasoning: Reasoning = "inline",
) -> FastAPI:
    """Build the server around a policy, a speaker, or both; what is missing is not routed.

    The policy must keep no memory between requests: OpenPI has no message for a new episode. `reasoning` says
    where thoughts go: into the answer's text, or apart into `reasoning_content`.
    """
    engine = Engine(policy, speaker, room)
    metrics = Metrics(lambda: engine.waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()
        await run_in_threadpool(engine.join)

    app = FastAPI(title=name, version=version("blm"), docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.engine, app.state.metrics = engine, metrics
    app.add_exception_handler(RequestError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    _add_status(app, policy, speaker, api_key)
    add_models(app, engine, name, api_key)
    if speaker is not None:
        service = ChatService(
            name=name,
            engine=engine,
            metrics=metrics,
            limits=limits or Limits(),
            api_key=api_key,
            reasoning=reasoning,
            fingerprint=None if policy is None else policy.contract.revision,
        )
        app.state.chat = service
        add_chat(app, service)
        if (tokenizer := getattr(speaker, "tokenizer", None)) is not None:
            add_tokenizing(app, service, tokenizer)
    if policy is not None:
        add_policy(app, policy, api_key)
    return app


class Impatient(H11Protocol):
    """Closes connections over which nothing is asked: half open, or so slow that headers never end."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(access.PATIENCE_S, self._close_unless_asked)

    def _close_unless_asked(self) -> None:
        upgraded = self.transport.get_protocol() is not self
        if self.cycle is None and not upgraded:
            self.transport.close()


class Server(uvicorn.Server):
    """Told to stop, it takes nothing new and lets what has begun come to its end, for GRACE_S at most."""

    async def shutdown(self, sockets: Any = None) -> None:
        app: Any = self.config.app
        app.state.engine.close(GRACE_S - 1)
        await super().shutdown(sockets)


def server_config(app: FastAPI, host: str = "127.0.0.1", port: int = 8000) -> uvicorn.Config:
    """The uvicorn settings that OpenPI clients need: large frames, no compression."""
    return uvicorn.Config(
        app,
        host,
        port,
        http=Impatient,
        limit_concurrency=MOST_CONNECTIONS,
        ws="websockets-sansio",
        ws_max_size=MAX_FRAME,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=int(GRACE_S),
    )


def serve(app: FastAPI, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Run until interrupted. `host='0.0.0.0'` opens the server to the network: set an api_key then."""
    Server(server_config(app, host, port)).run()


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # no such route or method
        error = RequestError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    assert isinstance(error, RequestError)
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(error.to_json(), error.status, headers)


def _add_status(app: FastAPI, policy: Policy | None, speaker: Speaker | None, api_key: str | None) -> None:
    contract = policy.contract.to_json() if policy is not None else None
    about = {"version": version("blm"), "chat": speaker is not None, "policy": contract}

    @app.get("/healthz", response_class=PlainTextResponse)
    @app.get("/health", response_class=PlainTextResponse)
    async def health() -> Response:
        found = app.state.engine.health()
        if found.status == "ok":
            return PlainTextResponse("OK\n")
        if found.status == "failed":
            return PlainTextResponse(f"the model failed: {found.reason}\n", 500)
        return PlainTextResponse(f"{found.status}\n", 503, {"Retry-After": "1"})

    @app.get("/version")
    async def get_version() -> dict[str, Any]:
        return about

    @app.get("/metrics", response_class=PlainTextResponse)
    async def get_metrics(request: Request) -> Response:
        require_key(request.headers, api_key)
        return Response(app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)
