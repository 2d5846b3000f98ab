"""POST /tokenize and /detokenize, as in vLLM: count tokens with the model's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from fastapi import FastAPI, Request

from blm.serving.errors import RequestError, quoted
from blm.serving.protocols.openai.completions import ERROR_RESPONSES, ChatService
from blm.serving.protocols.openai.conversation import (
    EncodedConversation,
    check_text_size,
    encode_conversation,
)
from blm.serving.protocols.openai.request_body import Reservation, load_object, validated
from blm.serving.protocols.openai.schema import DetokenizeRequest, TokenizeRequest, body_schema, check_fields
from blm.types import BlmError, Message


class ChatTokenizer(Protocol):
    """A thread-safe tokenizer, such as `blm.backbone.tokenizing.BackboneTokenizer`."""

    @property
    def vocabulary(self) -> int: ...

    def encode(self, text: str, *, special: bool) -> list[int]: ...

    def encode_chat(self, messages: Sequence[Message]) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def names(self, tokens: Sequence[int]) -> list[str]: ...


def add_tokenizing(app: FastAPI, service: ChatService, tokenizer: ChatTokenizer) -> None:
    """Add both routes. They run in threads, not in the model thread, with the limits of chat."""

    @app.post("/tokenize", openapi_extra=body_schema(TokenizeRequest), responses=ERROR_RESPONSES)
    async def tokenize(request: Request) -> dict[str, Any]:
        reservation = Reservation(service.budget)
        try:
            parsed, conversation = await service.parsed(
                request, reservation, partial(_read_tokenize, service)
            )
            service.require_model(parsed.model)
            messages = None if conversation is None else await service.decoded(conversation, reservation)
            return await service.in_thread(partial(_tokenize, service, tokenizer, parsed, messages))
        finally:
            reservation.release()

    @app.post("/detokenize", openapi_extra=body_schema(DetokenizeRequest), responses=ERROR_RESPONSES)
    async def detokenize(request: Request) -> dict[str, str]:
        reservation = Reservation(service.budget)
        try:
            parsed = await service.parsed(request, reservation, partial(_read_detokenize, service, tokenizer))
            service.require_model(parsed.model)
            return {"prompt": await service.in_thread(partial(tokenizer.decode, parsed.tokens))}
        finally:
            reservation.release()


def _read_tokenize(
    service: ChatService, body: bytearray
) -> tuple[TokenizeRequest, EncodedConversation | None]:
    limits, capacity = service.limits, service.capacity
    document = load_object(body, limits.values(capacity))
    check_fields(document, TokenizeRequest)
    parsed = validated(TokenizeRequest, document)
    if (parsed.prompt is None) == (parsed.messages is None):
        raise RequestError(400, "exactly one of prompt and messages is required", "prompt")
    if parsed.messages is not None:
        return parsed, encode_conversation(parsed.messages, limits, capacity)
    check_text_size("prompt", [parsed.prompt or ""], capacity)
    return parsed, None


def _tokenize(
    service: ChatService,
    tokenizer: ChatTokenizer,
    parsed: TokenizeRequest,
    messages: Sequence[Message] | None,
) -> dict[str, Any]:
    if messages is None:
        tokens = tokenizer.encode(parsed.prompt or "", special=parsed.add_special_tokens is not False)
    else:
        try:
            tokens = tokenizer.encode_chat(messages)
        except BlmError as error:
            raise RequestError(400, str(error), "messages") from error
    return {
        "count": len(tokens),
        "max_model_len": service.capacity.context_tokens,
        "tokens": tokens,
        "token_strs": tokenizer.names(tokens) if parsed.return_token_strs else None,
    }


def _read_detokenize(service: ChatService, tokenizer: ChatTokenizer, body: bytearray) -> DetokenizeRequest:
    capacity = service.capacity
    document = load_object(body, service.limits.values(capacity))
    check_fields(document, DetokenizeRequest)
    parsed = validated(DetokenizeRequest, document)
    if len(parsed.tokens) > capacity.context_tokens:
        message = f"tokens: {len(parsed.tokens)} tokens; the context has {capacity.context_tokens}"
        raise RequestError(400, message, "tokens", "context_length_exceeded")
    if wrong := [token for token in parsed.tokens if token >= tokenizer.vocabulary][:1]:
        message = f"tokens: {quoted(wrong[0])} is not a token id; ids are 0 .. {tokenizer.vocabulary - 1}"
        raise RequestError(400, message, "tokens")
    return parsed
