"""POST /v1/chat/completions: OpenAI-compatible chat, whole or streamed."""

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
    DEFAULT_CAPACITY,
    ChatLimits,
    EncodedConversation,
    ParsedChat,
    parse_request,
)
from blm.serving.protocols.openai.reply import ChoiceDelta, ChoiceState, Reasoning, ReplyFormat, event, usage
from blm.serving.protocols.openai.request_body import MemoryBudget, Reservation, read_body
from blm.serving.protocols.openai.schema import ChatCompletionRequest, body_schema
from blm.serving.scheduler import BusyError, ModelScheduler
from blm.types import BlmError, ChatCapacity, Message

COPIES_IN_PARSING = 3
"""Memory while a body is parsed, in multiples of its size.

It holds the body, its JSON, and the decoded image files.
"""
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"description": "a field is wrong; the error names it and the reason"},
    401: {"description": "wrong or missing API key"},
    404: {"description": "the model does not exist on this server"},
    408: {"description": "the body did not arrive in time"},
    413: {"description": "the body is too large"},
    503: {"description": "too many requests are queued, or they take too much memory; see Retry-After"},
}
CHAT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the answer; with `stream`, server-sent events",
        "content": {"text/event-stream": {}},
    },
    **ERROR_RESPONSES,
}
"""Responses in the OpenAPI document, by status."""
Deltas = AsyncGenerator[list[ChoiceDelta], None]
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ChatService:
    """State shared by the chat and tokenization routes."""

    name: str
    """The name of the model in requests."""
    scheduler: ModelScheduler
    metrics: Metrics
    limits: ChatLimits
    reasoning: Reasoning = "inline"
    fingerprint: str | None = None
    """The `system_fingerprint` of replies: the hash of the weights."""
    budget: MemoryBudget = field(init=False)
    parsing: anyio.CapacityLimiter = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", MemoryBudget(self.limits.memory_bytes))
        object.__setattr__(self, "parsing", anyio.CapacityLimiter(self.limits.parsing_threads))

    @property
    def capacity(self) -> ChatCapacity:
        return self.scheduler.capacity or DEFAULT_CAPACITY

    def parse(self, body: bytearray) -> ParsedChat:
        """Parse and check a chat request. Raises RequestError."""
        return parse_request(body, self.limits, self.capacity)

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Run blocking work in a thread, at most `limits.parsing_threads` at a time."""
        return await to_thread.run_sync(work, limiter=self.parsing)

    async def parsed(
        self, request: Request, reservation: Reservation, parse: Callable[[bytearray], Result]
    ) -> Result:
        """Read the body of a request and return the result of `parse`. Raises RequestError."""
        body = await read_body(request, self.limits.body(self.capacity), reservation)
        reservation.hold(COPIES_IN_PARSING * len(body))
        result = await self.in_thread(lambda: parse(body))
        reservation.hold(len(body))  # the image files
        return result

    async def decoded(
        self, conversation: EncodedConversation, reservation: Reservation
    ) -> tuple[Message, ...]:
        """Return a conversation with decoded images. Raises RequestError."""
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

    schema = body_schema(ChatCompletionRequest)

    @app.post("/v1/chat/completions", openapi_extra=schema, responses=CHAT_RESPONSES)
    async def completions(request: Request) -> Response:
        reservation = Reservation(service.budget)
        try:
            parsed = await service.parsed(request, reservation, service.parse)
            service.require_model(parsed.request.model)
            messages = await service.decoded(parsed.conversation, reservation)
            reply = await _ChatHandler(service, parsed.request, messages, reservation).reply(request)
        except BaseException as error:
            reservation.release()
            if isinstance(error, RequestError):
                service.metrics.requests.labels("chat", error.status).inc()
            raise
        service.metrics.requests.labels("chat", reply.status_code).inc()
        return reply


class _ChatHandler:
    """Answers one chat request: queues it, and turns its snapshots into the reply."""

    def __init__(
        self,
        service: ChatService,
        request: ChatCompletionRequest,
        messages: tuple[Message, ...],
        reservation: Reservation,
    ) -> None:
        self.service, self.request, self.messages, self.reservation = service, request, messages, reservation
        self.samplings = request.samplings(service.capacity.context_tokens)
        reasoning = reasoning_of(request, service.reasoning)
        self.choices = [ChoiceState(index, request.stops, reasoning) for index in range(len(self.samplings))]
        self.reply_format = ReplyFormat(service.name, service.fingerprint)
        self.prompt_tokens = 0
        self.client: str | None = None
        """The client's address; the request queue serves clients round-robin."""

    async def reply(self, request: Request) -> Response:
        """Return the response.

        Raises RequestError, before anything is sent, if the model cannot answer.
        """
        self.client = None if request.client is None else request.client.host
        deltas = self.deltas()
        if not self.request.stream:
            disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
            answering = asyncio.ensure_future(_consume(deltas))
            try:
                done, _ = await asyncio.wait({disconnect, answering}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                disconnect.cancel()
                if not answering.done():  # the client has disconnected
                    answering.cancel()
                    with suppress(asyncio.CancelledError):
                        await answering
                self.reservation.release()
            if answering not in done:
                return Response(status_code=499)
            answering.result()
            return JSONResponse(self.reply_format.completion(self.choices, self.prompt_tokens))
        try:
            first = await anext(deltas)
        except BaseException:
            await deltas.aclose()
            raise
        return _Stream(self.events(first, deltas), deltas, self.reservation)

    async def deltas(self) -> Deltas:
        """Yield the new text of all choices. Raises RequestError."""
        start, first = monotonic(), True
        scheduler, metrics = self.service.scheduler, self.service.metrics
        try:
            chat = scheduler.chat(self.messages, self.samplings, self.client)
        except BusyError as error:
            raise refusal(error) from error
        try:
            async for snapshots in chat:
                self.prompt_tokens = chat.prompt_tokens
                if first:
                    metrics.first_token.observe(monotonic() - start)
                    first = False
                yield [
                    choice.add(snapshot.text, snapshot.tokens, snapshot.ended)
                    for choice, snapshot in zip(self.choices, snapshots, strict=True)
                    if choice.finish is None
                ]
                if all(choice.finish for choice in self.choices):
                    break
        except Exception as error:
            raise refusal(error) from error
        finally:
            scheduler.cancel(chat)
            metrics.tokens.inc(sum(choice.text.tokens for choice in self.choices))

    async def events(self, first: list[ChoiceDelta], deltas: Deltas) -> AsyncIterator[str]:
        """Yield server-sent events. An error becomes the last event."""
        for choice in self.choices:
            yield event(self.reply_format.first_chunk(choice.index))
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
            yield event(self.reply_format.usage_chunk(self.choices, self.prompt_tokens))
        yield "data: [DONE]\n\n"

    def chunks(self, deltas: list[ChoiceDelta]) -> list[str]:
        chunks = [chunk for delta in deltas for chunk in self.reply_format.chunks(delta)]
        if self.request.continuous_usage:
            counts = {"usage": usage(self.choices, self.prompt_tokens)}
            chunks = [chunk | counts for chunk in chunks]
        return [event(chunk) for chunk in chunks]


class _Stream(StreamingResponse):
    """A stream of events that cancels the request when the connection ends.

    It closes `deltas`, even if the connection is lost before the first event.
    """

    def __init__(self, events: AsyncIterator[str], deltas: Deltas, reservation: Reservation) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.deltas, self.reservation = deltas, reservation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.reservation.release()
            await self.deltas.aclose()


def reasoning_of(request: ChatCompletionRequest, default: Reasoning) -> Reasoning:
    """Return where to send the reasoning of an answer: the request's or the server's setting."""
    if request.include_reasoning is False:
        return "hidden"
    if request.separate_reasoning is None:
        return default
    return "separate" if request.separate_reasoning else "inline"


def refusal(error: Exception) -> RequestError:
    """Return the HTTP error for an exception of the scheduler or the model."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, BlmError):
        return RequestError(503 if isinstance(error, BusyError) else 400, str(error))
    return RequestError(500, f"the chat failed: {error!r}")


async def _consume(deltas: Deltas) -> None:
    async with aclosing(deltas):
        async for _ in deltas:
            pass


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
