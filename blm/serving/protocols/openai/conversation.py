"""Parse a chat request: bytes -> JSON -> validated request -> conversation.

There is no model and no network here. Cheap checks come first: sizes are limited before anything is
tokenized or decoded.
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
    ChatCompletionRequest,
    ChatMessage,
    ImagePart,
    RefusalPart,
    ToolCall,
    check_fields,
)
from blm.types import ChatCapacity, Image, Message

__all__ = ["ChatLimits", "ParsedChat", "RequestError", "parse_request"]

DEFAULT_CAPACITY = ChatCapacity(context_tokens=4096, image_tokens=1, max_text_bytes=65_536, max_images=16)
"""Capacity of a generator that does not state it."""
PICTURE_BYTES = 4 * 2**20
"""Size of an encoded photo of 12 megapixels [bytes]."""
LARGE_PICTURES = 4
"""Number of such photos that fit into a body; more images must be smaller."""
ESCAPED_BYTES = 6
r"""Maximum length of the JSON form of one byte of text, such as \u0041 [bytes]."""
FIELD_BYTES = 2**18
"""Size of the remaining fields of a body [bytes]."""
VALUES_PER_TOKEN = 8
"""Maximum number of JSON values per token, which may consist of several brackets."""
FIELD_VALUES = 10_000
"""Number of JSON values of the remaining fields."""

Role = Literal["system", "user", "assistant"]
ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "user",
    "function": "user",
}
"""Role in a request -> role in the chat template."""
ContentPart = str | tuple[str, str]
"""A text, or an image as its path in the request and its data URI."""


@dataclass(frozen=True, kw_only=True)
class ChatLimits:
    """Size limits of chat requests."""

    body_bytes: int | None = None
    """Maximum size of a request body; None derives it from the model's context length."""
    pixels: int = 16_000_000
    """Maximum pixels of one image; a photo has about 12 million."""
    total_pixels: int = 32_000_000
    """Maximum pixels of all images in one request."""
    memory_bytes: int = 512 * 2**20
    """Memory of all requests in progress, until the ends of their answers [bytes]."""
    parsing_threads: int = 2
    """Maximum number of requests that are parsed, decoded or tokenized at a time."""

    def body(self, capacity: ChatCapacity) -> int:
        """Return the maximum size of a request body [bytes]."""
        if self.body_bytes is not None:
            return self.body_bytes
        pictures = min(capacity.max_images, LARGE_PICTURES) * PICTURE_BYTES
        return pictures + ESCAPED_BYTES * capacity.max_text_bytes + FIELD_BYTES

    def values(self, capacity: ChatCapacity) -> int:
        """Return the maximum number of JSON values in a request body."""
        return VALUES_PER_TOKEN * capacity.context_tokens + FIELD_VALUES


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation whose sizes are checked and whose images are still encoded."""

    turns: Sequence[tuple[Role, Sequence[str | EncodedPicture]]]
    """Role, and content in reading order, of each turn."""

    @property
    def pictures(self) -> Iterator[EncodedPicture]:
        return (part for _, parts in self.turns for part in parts if not isinstance(part, str))

    @property
    def decoded_bytes(self) -> int:
        """Memory of the decoded images."""
        return BYTES_PER_PIXEL * sum(picture.pixels for picture in self.pictures)

    @property
    def decoding_bytes(self) -> int:
        """Peak memory of decoding."""
        return self.decoded_bytes + DECODING_BYTES_PER_PIXEL * max(
            (p.pixels for p in self.pictures), default=0
        )

    def decoded(self) -> tuple[Message, ...]:
        """Return the conversation with decoded images.

        Raises RequestError for a broken image.
        """
        return tuple(
            Message(
                role, tuple(part if isinstance(part, str) else Image(pixels=decode(part)) for part in parts)
            )
            for role, parts in self.turns
        )


@dataclass(frozen=True)
class ParsedChat:
    request: ChatCompletionRequest
    conversation: EncodedConversation


def parse_request(
    body: bytes | bytearray, limits: ChatLimits, capacity: ChatCapacity = DEFAULT_CAPACITY
) -> ParsedChat:
    """Parse a request body.

    Raises RequestError with status 400 that names the field, value and rule.
    """
    document = load_object(body, limits.values(capacity))
    check_fields(document, ChatCompletionRequest)
    request = validated(ChatCompletionRequest, document)
    return ParsedChat(request, encode_conversation(request.messages, limits, capacity))


def encode_conversation(
    turns: Sequence[ChatMessage], limits: ChatLimits, capacity: ChatCapacity
) -> EncodedConversation:
    """Check the sizes of a conversation and read the headers of its images.

    Raises RequestError for more messages and parts than the context has tokens, for more text or
    images than fit into it, and for too many pixels.
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
        message = f"messages: {len(uris)} images; at most {capacity.max_images} fit into the model's context"
        raise RequestError(400, message, "messages", "too_many_images")
    pictures = iter(read_pictures(uris, limits.pixels, limits.total_pixels))
    return EncodedConversation(
        [
            (ROLES[turn.role], [part if isinstance(part, str) else next(pictures) for part in parts])
            for turn, parts in zip(turns, rendered, strict=True)
        ]
    )


def check_text_size(field: str, texts: Sequence[str], capacity: ChatCapacity) -> None:
    """Raise RequestError for more text than the context can hold in any tokenization."""
    size = sum(len(text.encode()) for text in texts)
    if size > capacity.max_text_bytes:
        message = (
            f"{field}: {size} bytes of text; the context of {capacity.context_tokens} tokens holds at most "
            f"{capacity.max_text_bytes}"
        )
        raise RequestError(400, message, field, "context_length_exceeded")


def _content(turn: ChatMessage, index: int, tools: Mapping[str, str]) -> list[ContentPart]:
    """Return the content of a turn in reading order.

    `tools` maps the id of a tool call to the tool's name. The model does not support tools. A tool
    call in the history becomes the text `Call of NAME(ARGUMENTS)`, and its result becomes a turn of
    the user that begins with `Result of NAME: `.
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


def _calls(turn: ChatMessage) -> list[ToolCall]:
    if turn.role != "assistant":
        return []
    return (turn.tool_calls or []) + ([ToolCall(function=turn.function_call)] if turn.function_call else [])
