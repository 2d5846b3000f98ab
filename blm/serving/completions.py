"""Routes of chat in the OpenAI form."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse

from blm.serving import access
from blm.serving.access import require_key
from blm.serving.chat import OPENAPI, ChatRequest, Finish, Limits, Reply, RequestError, Telling, parse_request
from blm.serving.engine import BusyError, Engine
from blm.serving.metrics import Metrics
from blm.types import BlmError, Message

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


def add_chat(app: FastAPI, name: str, api_key: str | None, limits: Limits) -> None:
    @app.post("/v1/chat/completions", openapi_extra=OPENAPI, responses=ANSWERS)
    async def completions(request: Request) -> Response:
        require_key(request.headers, api_key)
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
        async with asyncio.timeout(access.PATIENCE_S):
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise RequestError(413, f"the request body is larger than {most} bytes")
    except TimeoutError:
        raise RequestError(408, f"the request body did not arrive within {access.PATIENCE_S:g} s") from None
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
