"""One process for both spaces: chat in the OpenAI form and actions in the OpenPI form, on one port."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from importlib.metadata import version
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from blm.serving import wire
from blm.serving.chat import OPENAPI, ChatRequest, Finish, Limits, Reply, RequestError, Telling, parse_request
from blm.serving.client import MAX_FRAME
from blm.serving.engine import BusyError, Engine, Room, Speaker
from blm.serving.metrics import Metrics
from blm.types import BlmError, LateError, Message, Policy

log = logging.getLogger(__name__)
OPENPI_PATHS = ("/", "/v1/realtime/robot/openpi")
"""OpenPI's own path, and the one that vLLM-Omni serves."""
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "the answer, or with `stream` its pieces", "content": {"text/event-stream": {}}},
    400: {"description": "the field at fault, and why"},
    401: {"description": "wrong or missing API key"},
    404: {"description": "another model's name"},
    408: {"description": "the body did not arrive in time"},
    413: {"description": "the body is too large"},
    503: {"description": "the line is full; see Retry-After"},
}
News = AsyncGenerator[list[tuple[int, str, Finish | None]], None]
GRACE_S = 4.0
"""What has begun may take this long to end when the server is told to stop."""
PATIENCE_S = 20.0
"""A client has this long to say what it wants, and then to send it."""
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
) -> FastAPI:
    """Build the server around a policy, a speaker, or both; what is missing is not routed.

    The policy must keep no memory between requests: OpenPI has no message for a new episode.
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
    _add_status(app, policy, speaker, name, api_key)
    if speaker is not None:
        _add_chat(app, name, api_key, limits or Limits())
    if policy is not None:
        _add_policy(app, policy, api_key)
    return app


class Impatient(H11Protocol):
    """Closes connections over which nothing is asked: half open, or so slow that headers never end."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(PATIENCE_S, self._close_unless_asked)

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


def _add_status(
    app: FastAPI, policy: Policy | None, speaker: Speaker | None, name: str, api_key: str | None
) -> None:
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "blm"}
    contract = policy.contract.to_json() if policy is not None else None
    about = {"version": version("blm"), "chat": speaker is not None, "policy": contract}

    @app.get("/healthz", response_class=PlainTextResponse)
    @app.get("/health", response_class=PlainTextResponse)
    async def health() -> Response:
        if not app.state.engine.ready.is_set():
            return PlainTextResponse("warming up\n", 503, {"Retry-After": "1"})
        if app.state.engine.failed is not None:
            return PlainTextResponse(f"the model failed: {app.state.engine.failed!r}\n", 500)
        return PlainTextResponse("OK\n")

    @app.get("/version")
    async def get_version() -> dict[str, Any]:
        return about

    @app.get("/metrics", response_class=PlainTextResponse)
    async def get_metrics(request: Request) -> Response:
        _require_key(request.headers, api_key)
        return Response(app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _require_key(request.headers, api_key)
        return {"object": "list", "data": [model]}


# --- chat ---------------------------------------------------------------------------------------------------


def _add_chat(app: FastAPI, name: str, api_key: str | None, limits: Limits) -> None:
    @app.post("/v1/chat/completions", openapi_extra=OPENAPI, responses=ANSWERS)
    async def completions(request: Request) -> Response:
        _require_key(request.headers, api_key)
        try:
            body = await _body(request, limits.body_bytes)
            asked, messages = await run_in_threadpool(parse_request, body, limits)
            if asked.model != name:
                message = f"the model '{asked.model}' does not exist; this server has '{name}'"
                raise RequestError(404, message, "model", "model_not_found")
            reply = await _Answering(app, asked, messages).reply(request)
        except RequestError as error:
            app.state.metrics.requests.labels("chat", error.status).inc()
            raise
        app.state.metrics.requests.labels("chat", reply.status_code).inc()
        return reply


async def _body(request: Request, most: int) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(PATIENCE_S):
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise RequestError(413, f"the request body is larger than {most} bytes")
    except TimeoutError:
        raise RequestError(408, f"the request body did not arrive within {PATIENCE_S:g} s") from None
    return bytes(body)


class _Answering:
    """One chat request, from the line before the model to its reply."""

    def __init__(self, app: FastAPI, asked: ChatRequest, messages: tuple[Message, ...]) -> None:
        self.engine: Engine = app.state.engine
        self.metrics: Metrics = app.state.metrics
        self.asked, self.messages, self.form = asked, messages, Reply(asked.model)
        self.told = [Telling(asked.stops) for _ in asked.samplings]
        self.prompt_tokens = 0

    async def reply(self, request: Request) -> Response:
        """Raises RequestError, before anything is sent, for what the model cannot answer."""
        news = self.news()
        if not self.asked.stream:
            listening = asyncio.ensure_future(_gone(request))
            answering = asyncio.ensure_future(_drain(news))
            done, _ = await asyncio.wait({listening, answering}, return_when=asyncio.FIRST_COMPLETED)
            listening.cancel()
            if answering not in done:  # nobody waits for the answer any more
                answering.cancel()
                with suppress(asyncio.CancelledError):
                    await answering
                return Response(status_code=499)
            answering.result()
            return JSONResponse(self.form.whole(self.told, self.prompt_tokens))
        try:
            first = await anext(news)
        except BaseException:
            await news.aclose()
            raise
        return StreamingResponse(self.events(first, news), media_type="text/event-stream")

    async def news(self) -> News:
        """Yield what is new: number of the answer, text to add, and why it ended. Raises RequestError."""
        start, first = time.monotonic(), True
        try:
            talk = self.engine.talk(self.messages, self.asked.samplings)
        except BusyError as error:
            raise _refusal(error) from error
        try:
            async for said in talk:
                self.prompt_tokens = talk.prompt_tokens
                if first:
                    self.metrics.first_token.observe(time.monotonic() - start)
                    first = False
                new = list[tuple[int, str, Finish | None]]()
                for index, (one, told) in enumerate(zip(said, self.told, strict=True)):
                    if told.finish is None:
                        new.append((index, told.add(one.text, one.tokens, one.ended), told.finish))
                yield new
                if all(told.finish for told in self.told):
                    break
        except Exception as error:
            raise _refusal(error) from error
        finally:
            self.engine.leave(talk)
            self.metrics.tokens.inc(sum(told.tokens for told in self.told))

    async def events(self, first: list[tuple[int, str, Finish | None]], news: News) -> AsyncIterator[str]:
        """Server-sent events; when the client leaves, so does the answer."""
        for index in range(len(self.told)):
            yield self.form.chunk(index, {"role": "assistant", "content": ""})
        async with aclosing(news):
            try:
                for event in self.chunks(first):
                    yield event
                async for new in news:
                    for event in self.chunks(new):
                        yield event
            except RequestError as error:
                yield f"data: {json.dumps(error.to_json())}\n\n"
                return
        if self.asked.stream_options is not None and self.asked.stream_options.include_usage:
            yield self.form.usage_chunk(self.told, self.prompt_tokens)
        yield "data: [DONE]\n\n"

    def chunks(self, new: list[tuple[int, str, Finish | None]]) -> list[str]:
        said = [self.form.chunk(index, {"content": text}) for index, text, _ in new if text]
        return said + [self.form.chunk(index, {}, finish) for index, _, finish in new if finish]


async def _drain(news: News) -> None:
    async with aclosing(news):
        async for _ in news:
            pass


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, BlmError):
        return RequestError(503 if isinstance(error, BusyError) else 400, str(error))
    return RequestError(500, f"the chat failed: {error!r}")


# --- actions ------------------------------------------------------------------------------------------------


def _add_policy(app: FastAPI, policy: Policy, api_key: str | None) -> None:
    async def openpi(socket: WebSocket) -> None:
        try:
            _require_key(socket.headers, api_key)
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


def _require_key(headers: Mapping[str, str], api_key: str | None) -> None:
    """OpenAI clients send 'Bearer <key>', OpenPI clients 'Api-Key <key>'."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    known = scheme.lower() in ("bearer", "api-key")
    if api_key is not None and not (known and hmac.compare_digest(given.encode(), api_key.encode())):
        raise RequestError(401, "wrong or missing API key", code="invalid_api_key")


def _milliseconds_since(start: float) -> float:
    return (time.monotonic() - start) * 1000
