"""Routes of chat in the OpenAI form."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

import anyio
from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from blm.serving.errors import RequestError, quoted
from blm.serving.metrics import Metrics
from blm.serving.protocols.openai.conversation import (
    UNSTATED,
    Conversation,
    Limits,
    ParsedChat,
    parse_request,
)
from blm.serving.protocols.openai.reply import AnswerInProgress, ChatReply, Delta, Reasoning, event, usage
from blm.serving.protocols.openai.request_body import MemoryBudget, Reservation, read_body
from blm.serving.protocols.openai.schema import ChatRequest, body_schema
from blm.serving.scheduler import BusyError, Engine
from blm.types import BlmError, ChatCapacity, Message

COPIES_IN_PARSING = 3
"""Of a body: itself, its JSON, and the pictures' files out of their base64."""
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "the answer, or with `stream` its pieces", "content": {"text/event-stream": {}}},
    400: {"description": "the field at fault, and why"},
    401: {"description": "wrong or missing API key"},
    404: {"description": "another model's name"},
    408: {"description": "the body did not arrive in time"},
    413: {"description": "the body is too large"},
    503: {"description": "too many requests wait, or take too much memory; see Retry-After"},
}
Deltas = AsyncGenerator[list[Delta], None]
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ChatService:
    """What the routes of chat share."""

    name: str
    """Model name that clients ask for."""
    engine: Engine
    metrics: Metrics
    limits: Limits
    reasoning: Reasoning = "inline"
    fingerprint: str | None = None
    """`system_fingerprint` of replies: hash of the weights."""
    budget: MemoryBudget = field(init=False)
    parsing: anyio.CapacityLimiter = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", MemoryBudget(self.limits.memory_bytes))
        object.__setattr__(self, "parsing", anyio.CapacityLimiter(self.limits.parsing_threads))

    @property
    def capacity(self) -> ChatCapacity:
        return self.engine.capacity or UNSTATED

    def parse(self, body: bytearray) -> ParsedChat:
        """Read a chat request. Raises RequestError."""
        return parse_request(body, self.limits, self.capacity)

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Run what takes long off the event loop, a bounded number at a time."""
        return await to_thread.run_sync(work, limiter=self.parsing)

    async def parsed(
        self, request: Request, reservation: Reservation, parse: Callable[[bytearray], Result]
    ) -> Result:
        """Return what `parse` makes of the body of a request. Raises RequestError."""
        body = await read_body(request, self.limits.body(self.capacity), reservation)
        reservation.hold(COPIES_IN_PARSING * len(body))
        result = await self.in_thread(lambda: parse(body))
        reservation.hold(len(body))  # the pictures' files
        return result

    async def decoded(self, conversation: Conversation, reservation: Reservation) -> tuple[Message, ...]:
        """Return a conversation with its pictures. Raises RequestError."""
        reservation.hold(reservation.held + conversation.decoding_bytes)
        messages = await self.in_thread(conversation.decoded)
        reservation.hold(conversation.decoded_bytes)
        return messages

    def require_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            message = f"the model {quoted(name)} does not exist; this server has {quoted(self.name)}"
            raise RequestError(404, message, "model", "model_not_found")


def add_chat(app: FastAPI, service: ChatService) -> None:
    """Add POST /v1/chat/completions."""

    @app.post("/v1/chat/completions", openapi_extra=body_schema(ChatRequest), responses=ANSWERS)
    async def completions(request: Request) -> Response:
        reservation = Reservation(service.budget)
        try:
            parsed = await service.parsed(request, reservation, service.parse)
            service.require_model(parsed.request.model)
            messages = await service.decoded(parsed.conversation, reservation)
            reply = await _Answering(service, parsed.request, messages, reservation).reply(request)
        except BaseException as error:
            reservation.release()
            if isinstance(error, RequestError):
                service.metrics.requests.labels("chat", error.status).inc()
            raise
        service.metrics.requests.labels("chat", reply.status_code).inc()
        return reply


class _Answering:
    """One chat request, from the queue before the model to its reply."""

    def __init__(
        self,
        service: ChatService,
        request: ChatRequest,
        messages: tuple[Message, ...],
        reservation: Reservation,
    ) -> None:
        self.service, self.request, self.messages, self.reservation = service, request, messages, reservation
        self.samplings = request.samplings(service.capacity.context_tokens)
        reasoning = reasoning_of(request, service.reasoning)
        self.answers = [
            AnswerInProgress(index, request.stops, reasoning) for index in range(len(self.samplings))
        ]
        self.form = ChatReply(service.name, service.fingerprint)
        self.prompt_tokens = 0
        self.client: str | None = None
        """Its address: clients take turns before the model."""

    async def reply(self, request: Request) -> Response:
        """Raises RequestError, before anything is sent, for what the model cannot answer."""
        self.client = None if request.client is None else request.client.host
        deltas = self.deltas()
        if not self.request.stream:
            leaving = asyncio.ensure_future(_disconnected(request))
            answering = asyncio.ensure_future(_drain(deltas))
            try:
                done, _ = await asyncio.wait({leaving, answering}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                leaving.cancel()
                if not answering.done():  # nobody waits for the answer any more
                    answering.cancel()
                    with suppress(asyncio.CancelledError):
                        await answering
                self.reservation.release()
            if answering not in done:
                return Response(status_code=499)
            answering.result()
            return JSONResponse(self.form.whole(self.answers, self.prompt_tokens))
        try:
            first = await anext(deltas)
        except BaseException:
            await deltas.aclose()
            raise
        return _Stream(self.events(first, deltas), deltas, self.reservation)

    async def deltas(self) -> Deltas:
        """Yield what is new of the answers. Raises RequestError."""
        start, first = monotonic(), True
        engine, metrics = self.service.engine, self.service.metrics
        try:
            talk = engine.talk(self.messages, self.samplings, self.client)
        except BusyError as error:
            raise refusal(error) from error
        try:
            async for states in talk:
                self.prompt_tokens = talk.prompt_tokens
                if first:
                    metrics.first_token.observe(monotonic() - start)
                    first = False
                yield [
                    answer.add(state.text, state.tokens, state.ended)
                    for answer, state in zip(self.answers, states, strict=True)
                    if answer.finish is None
                ]
                if all(answer.finish for answer in self.answers):
                    break
        except Exception as error:
            raise refusal(error) from error
        finally:
            engine.leave(talk)
            metrics.tokens.inc(sum(answer.text.tokens for answer in self.answers))

    async def events(self, first: list[Delta], deltas: Deltas) -> AsyncIterator[str]:
        """Server-sent events. An error becomes the last one."""
        for answer in self.answers:
            yield event(self.form.first_chunk(answer.index))
        try:
            for text in self.chunks(first):
                yield text
            async for new in deltas:
                for text in self.chunks(new):
                    yield text
        except RequestError as error:
            yield event(error.to_json())
            return
        if self.request.includes_usage:
            yield event(self.form.usage_chunk(self.answers, self.prompt_tokens))
        yield "data: [DONE]\n\n"

    def chunks(self, deltas: list[Delta]) -> list[str]:
        found = [chunk for delta in deltas for chunk in self.form.chunks(delta)]
        if self.request.counts_on:
            counts = {"usage": usage(self.answers, self.prompt_tokens)}
            found = [chunk | counts for chunk in found]
        return [event(chunk) for chunk in found]


class _Stream(StreamingResponse):
    """Events of an answer that ends with its connection, even if that is lost before the first event."""

    def __init__(self, events: AsyncIterator[str], deltas: Deltas, reservation: Reservation) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.deltas, self.reservation = deltas, reservation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.reservation.release()
            await self.deltas.aclose()


def reasoning_of(request: ChatRequest, default: Reasoning) -> Reasoning:
    """Return where the thoughts of an answer go: the request's wish before the server's setting."""
    if request.include_reasoning is False:
        return "hidden"
    if request.separate_reasoning is None:
        return default
    return "separate" if request.separate_reasoning else "inline"


def refusal(error: Exception) -> RequestError:
    """Return what an error of the model's thread is for the client."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, BlmError):
        return RequestError(503 if isinstance(error, BusyError) else 400, str(error))
    return RequestError(500, f"the chat failed: {error!r}")


async def _drain(deltas: Deltas) -> None:
    async with aclosing(deltas):
        async for _ in deltas:
            pass


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
