"""A chat request: bytes -> JSON -> checked request -> conversation. No model and no network in here.

The order is that of the costs: sizes are counted and capped before anything is tokenised or decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from blm.serving.errors import RequestError
from blm.serving.protocols.openai.images import (
    BYTES_PER_PIXEL,
    DECODING_BYTES_PER_PIXEL,
    EncodedPicture,
    decode,
    read_pictures,
)
from blm.serving.protocols.openai.request_body import load_object, validated
from blm.serving.protocols.openai.schema import (
    ChatRequest,
    ImagePart,
    RefusalPart,
    ToolCall,
    Turn,
    check_fields,
)
from blm.types import ChatCapacity, Image, Message

__all__ = ["Limits", "ParsedChat", "RequestError", "parse_request"]

UNSTATED = ChatCapacity(context_tokens=4096, image_tokens=1, max_text_bytes=65_536, max_images=16)
"""For a speaker that does not state what it can hold."""
PICTURE_BYTES = 4 * 2**20
"""Encoded; an ordinary photo of 12 megapixels."""
LARGE_PICTURES = 4
"""So many of PICTURE_BYTES fit into a body; more must be smaller."""
ESCAPED_BYTES = 6
"""A byte of text as JSON writes it at worst: \\u0041."""
FIELD_BYTES = 2**18
"""Of a body, for all that is neither text nor pictures."""
VALUES_PER_TOKEN, FIELD_VALUES = 8, 10_000
"""JSON values of a body: what a context of text can hold (a token may be as many brackets), and fields."""

Role = Literal["system", "user", "assistant"]
ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "user",
    "function": "user",
}
"""Role in a request -> role that the model knows."""
ContentPart = str | tuple[str, str]
"""A text, or place in the request and data URI of a picture."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What clients may ask of the server. None: what follows from the model's context."""

    body_bytes: int | None = None
    pixels: int = 16_000_000
    """Of one picture: an ordinary photo has 12 million."""
    total_pixels: int = 32_000_000
    """Of all pictures in one request."""
    memory_bytes: int = 512 * 2**20
    """Of all requests in progress, from the first byte of a body to the end of the answer."""
    parsing_threads: int = 2
    """Requests that are parsed, decoded or tokenised at a time; the others wait."""

    def body(self, capacity: ChatCapacity) -> int:
        """Return the largest body that can be answered."""
        if self.body_bytes is not None:
            return self.body_bytes
        pictures = min(capacity.max_images, LARGE_PICTURES) * PICTURE_BYTES
        return pictures + ESCAPED_BYTES * capacity.max_text_bytes + FIELD_BYTES

    def values(self, capacity: ChatCapacity) -> int:
        """Return the most JSON values of a body."""
        return VALUES_PER_TOKEN * capacity.context_tokens + FIELD_VALUES


@dataclass(frozen=True)
class Conversation:
    """Turns whose sizes are checked and whose pictures are not decoded yet."""

    turns: Sequence[tuple[Role, Sequence[str | EncodedPicture]]]
    """Role, and content in reading order."""

    @property
    def pictures(self) -> Iterator[EncodedPicture]:
        return (part for _, parts in self.turns for part in parts if not isinstance(part, str))

    @property
    def decoded_bytes(self) -> int:
        """Memory that the decoded pictures take."""
        return BYTES_PER_PIXEL * sum(picture.pixels for picture in self.pictures)

    @property
    def decoding_bytes(self) -> int:
        """Memory that decoding takes at its worst moment."""
        return self.decoded_bytes + DECODING_BYTES_PER_PIXEL * max(
            (p.pixels for p in self.pictures), default=0
        )

    def decoded(self) -> tuple[Message, ...]:
        """Return what the model is asked. Raises RequestError for a broken picture."""
        return tuple(
            Message(
                role, tuple(part if isinstance(part, str) else Image(pixels=decode(part)) for part in parts)
            )
            for role, parts in self.turns
        )


@dataclass(frozen=True)
class ParsedChat:
    request: ChatRequest
    conversation: Conversation


def parse_request(body: bytes | bytearray, limits: Limits, capacity: ChatCapacity = UNSTATED) -> ParsedChat:
    """Read a request body. Raises RequestError with status 400, naming field, value and rule."""
    document = load_object(body, limits.values(capacity))
    check_fields(document, ChatRequest)
    request = validated(ChatRequest, document)
    return ParsedChat(request, read_conversation(request.messages, limits, capacity))


def read_conversation(turns: Sequence[Turn], limits: Limits, capacity: ChatCapacity) -> Conversation:
    """Check the sizes of a conversation and read the headers of its pictures.

    Raises RequestError for more turns and parts than the context has tokens, more text than it holds, more
    pictures, or more pixels.
    """
    parts = len(turns) + sum(len(turn.content) for turn in turns if isinstance(turn.content, list))
    if parts > capacity.context_tokens:
        message = f"messages: {parts} messages and parts; the context has {capacity.context_tokens} tokens"
        raise RequestError(400, message, "messages", "context_length_exceeded")
    tools = {
        call.id: call.function.name for turn in turns for call in _calls(turn) if call.id and call.function
    }
    rendered = [_content(turn, index, tools) for index, turn in enumerate(turns)]
    check_text_size(
        "messages", [part for parts in rendered for part in parts if isinstance(part, str)], capacity
    )
    uris = [part for parts in rendered for part in parts if not isinstance(part, str)]
    if len(uris) > capacity.max_images:
        message = (
            f"messages: {len(uris)} pictures; at most {capacity.max_images} fit into the model's context"
        )
        raise RequestError(400, message, "messages", "too_many_images")
    pictures = iter(read_pictures(uris, limits.pixels, limits.total_pixels))
    return Conversation(
        [
            (ROLES[turn.role], [part if isinstance(part, str) else next(pictures) for part in parts])
            for turn, parts in zip(turns, rendered, strict=True)
        ]
    )


def check_text_size(field: str, texts: Sequence[str], capacity: ChatCapacity) -> None:
    """Raise RequestError for more text than the context can hold, whatever it says."""
    size = sum(len(text.encode()) for text in texts)
    if size > capacity.max_text_bytes:
        message = (
            f"{field}: {size} bytes of text; the context of {capacity.context_tokens} tokens holds at most "
            f"{capacity.max_text_bytes}"
        )
        raise RequestError(400, message, field, "context_length_exceeded")


def _content(turn: Turn, index: int, tools: Mapping[str, str]) -> list[ContentPart]:
    """Return the content of a turn in reading order. `tools`: id of a call -> name of its tool.

    The model knows no tools. A call in a history reads `Call of NAME(ARGUMENTS)`, its result is a turn of the
    user that begins with `Result of NAME: `.
    """
    parts = list[ContentPart]()
    if turn.role in ("tool", "function"):
        parts.append(f"Result of {turn.name or tools.get(turn.tool_call_id or '') or 'a tool'}: ")
    if isinstance(turn.content, str):
        parts.append(turn.content)
    elif turn.content is not None:
        for number, part in enumerate(turn.content):
            if isinstance(part, ImagePart):
                url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
                parts.append((f"messages.{index}.content.{number}.image_url", url))
            else:
                parts.append(part.refusal if isinstance(part, RefusalPart) else part.text)
    for call in _calls(turn):
        before = "\n" if parts else ""
        name, arguments = (call.function.name, call.function.arguments) if call.function else ("a tool", "")
        parts.append(f"{before}Call of {name}({arguments})")
    return parts


def _calls(turn: Turn) -> list[ToolCall]:
    if turn.role != "assistant":
        return []
    return (turn.tool_calls or []) + ([ToolCall(function=turn.function_call)] if turn.function_call else [])
