"""The OpenAI chat-completions form: reading requests, writing replies. No model and no network in here."""

from __future__ import annotations

import base64
import io
import json
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps
from pydantic import BaseModel, Field, ValidationError

from blm.types import BlmError, Chat, Image, ImageArray, Message

_DATA_URI = re.compile(r"data:image(?:/[\w.+-]+)?;base64,(.*)", re.DOTALL)
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client may ask of the server."""

    body_bytes: int = 32 * 2**20
    pixels: int = 16_000_000
    """Per picture."""
    waiting: int = 16
    """Requests of one kind (control, chat) that may wait for the model; more get 503."""


class RequestError(BlmError):
    """A request that cannot be served: an HTTP status, and which parameter is at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_json(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Url(BaseModel):
    url: str


class _TextPart(BaseModel):
    type: Literal["text"]
    text: str


class _ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: _Url


class _Turn(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[_TextPart | _ImagePart, Field(discriminator="type")]] | None = None


class _StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """What we read of a request; other fields are ignored. Decoding is greedy whatever `temperature` says."""

    model: str
    messages: list[_Turn] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    stop: str | list[str] | None = None
    n: Literal[1] | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None

    @property
    def token_limit(self) -> int:
        return self.max_completion_tokens or self.max_tokens or 256

    @property
    def stops(self) -> list[str]:
        return [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if stop]


@runtime_checkable
class CountsTokens(Protocol):
    """A Chat that can say how long a conversation is; without it replies carry `usage: null`."""

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of the rendered conversation, pictures included."""
        ...


def parse_request(body: bytes, limits: Limits) -> tuple[ChatRequest, tuple[Message, ...]]:
    """Read a request body. Raises RequestError with status 400, naming the field."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        deepest = max(error.errors(), key=lambda found: len(found["loc"]))
        where = ".".join(str(part) for part in deepest["loc"] if re.fullmatch(r"\w+", str(part)))
        raise RequestError(400, f"{where or 'body'}: {deepest['msg']}", where or None) from error
    return request, tuple(_message(turn, index, limits) for index, turn in enumerate(request.messages))


def _message(turn: _Turn, index: int, limits: Limits) -> Message:
    parts: list[str | Image] = []
    content = [_TextPart(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content
    for number, part in enumerate(content or []):
        if isinstance(part, _TextPart):
            parts.append(part.text)
        else:
            where = f"messages.{index}.content.{number}.image_url"
            parts.append(Image(pixels=_pixels(part.image_url.url, where, limits)))
    return Message("system" if turn.role == "developer" else turn.role, tuple(parts))


def _pixels(url: str, where: str, limits: Limits) -> ImageArray:
    def refusal(reason: str) -> RequestError:
        return RequestError(400, f"{where}: {reason}", where)

    found = _DATA_URI.fullmatch(url)
    if found is None:
        raise refusal(f"only 'data:image/...;base64,' URIs are accepted, got '{url[:40]}'")
    try:
        image = Pillow.open(io.BytesIO(base64.b64decode(found[1], validate=True)), formats=_FORMATS)
        if image.width * image.height <= limits.pixels:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
        raise refusal(f"not an image ({error}); accepted: {', '.join(_FORMATS)} in base64") from error
    raise refusal(f"{image.width} x {image.height} is more than {limits.pixels} pixels")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished answer."""

    model: str
    text: str
    finish_reason: Literal["stop", "length"]
    usage: dict[str, int] | None

    def to_json(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.text}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage}

    def events(self, include_usage: bool) -> Iterator[str]:
        """Server-sent events. The answer is made whole and then sent, so it comes as one delta."""
        head = self._head("chat.completion.chunk")
        first = {"delta": {"role": "assistant", "content": self.text}, "finish_reason": None}
        last: dict[str, Any] = {"delta": {}, "finish_reason": self.finish_reason}
        chunks = [{**head, "choices": [{"index": 0, **choice}]} for choice in (first, last)]
        if include_usage and self.usage is not None:
            chunks.append({**head, "choices": [], "usage": self.usage})
        yield from (f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        id_ = f"chatcmpl-{uuid.uuid4().hex}"
        return {"id": id_, "object": kind, "created": int(time.time()), "model": self.model}


def complete(chat: Chat, request: ChatRequest, messages: tuple[Message, ...]) -> Completion:
    """Ask `chat`, count tokens when it can, cut at the first stop string."""
    text = chat.answer(messages, max_tokens=request.token_limit)
    cuts = [cut for cut in (text.find(stop) for stop in request.stops) if cut >= 0]
    usage, full = None, False
    if isinstance(chat, CountsTokens):
        prompt = chat.count_tokens(messages)
        full_turn, empty_turn = (chat.count_tokens((Message("assistant", (words,)),)) for words in (text, ""))
        made = full_turn - empty_turn
        usage = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        full = made >= request.token_limit and not cuts
    text = text[: min(cuts)] if cuts else text
    return Completion(model=request.model, text=text, finish_reason="length" if full else "stop", usage=usage)
