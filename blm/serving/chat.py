"""The OpenAI chat-completions form: reading requests, writing replies. No model and no network in here."""

from __future__ import annotations

import base64
import io
import json
import re
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps
from pydantic import BaseModel, Field, ValidationError

from blm.types import BlmError, Image, ImageArray, Message, Sampling

_DATA_URI = re.compile(r"data:image(?:/[\w.+-]+)?;base64,(.*)", re.DOTALL)
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_TOKENS = 4096
MAX_ANSWERS = 8
"""Answers to one request (`n`)."""
Finish = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client may ask of the server."""

    body_bytes: int = 32 * 2**20
    pixels: int = 16_000_000
    """Per picture."""


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
    """What we read of a request; other fields are ignored."""

    model: str
    messages: list[_Turn] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    """Without it greedy: questions about a scene have one answer."""
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1, le=MAX_ANSWERS)
    stream: bool = False
    stream_options: _StreamOptions | None = None

    @property
    def samplings(self) -> list[Sampling]:
        """How each of the `n` answers is drawn; the n-th has the n-th seed from `seed` on."""
        limit = self.max_completion_tokens or self.max_tokens or 256
        first = self.seed if self.seed is not None else secrets.randbits(62)
        return [
            Sampling(
                max_tokens=limit,
                temperature=self.temperature or 0.0,
                top_p=self.top_p or 1.0,
                seed=(first + number) % 2**63,
            )
            for number in range(self.n or 1)
        ]

    @property
    def stops(self) -> list[str]:
        return [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if stop]


def _inlined(schema: Any, parts: Mapping[str, Any]) -> Any:
    """Put each part of a JSON schema where it is referred to: an operation of OpenAPI can hold no others."""
    if isinstance(schema, list):
        return [_inlined(value, parts) for value in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(parts[schema["$ref"].rpartition("/")[2]], parts)
    return {
        key: _inlined(value, parts) for key, value in schema.items() if key not in ("$defs", "discriminator")
    }


_SCHEMA = ChatRequest.model_json_schema()
OPENAPI = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _inlined(_SCHEMA, _SCHEMA["$defs"])}},
    }
}
"""What the OpenAPI document says about a request."""


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


class Telling:
    """What of one answer may be sent: text that need not be taken back, up to the first stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.sent, self.tokens = stops, "", 0
        self.finish: Finish | None = None

    def add(self, text: str, tokens: int, ended: Finish | None) -> str:
        """Take all that was said so far; return what is new to send."""
        self.tokens, text = tokens, text.lstrip()
        if cuts := [cut for cut in map(text.find, self.stops) if cut >= 0]:
            text, self.finish = text[: min(cuts)], "stop"
        elif ended:
            text, self.finish = text.rstrip(), ended
        else:
            text = text.rstrip("\ufffd").rstrip()  # half of a character, or space that may end the answer
            text = text[: len(text) - max(_overlap(text, stop) for stop in ("", *self.stops))]
        new = text[len(self.sent) :]
        self.sent += new
        return new


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Reply:
    """The JSON of one reply, whole or in chunks."""

    def __init__(self, model: str) -> None:
        self.id, self.created, self.model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model

    def whole(self, told: Sequence[Telling], prompt_tokens: int) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": one.sent},
                "finish_reason": one.finish,
            }
            for index, one in enumerate(told)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage(told, prompt_tokens)}

    def chunk(self, index: int, delta: Mapping[str, str], finish: Finish | None = None) -> str:
        """A server-sent event that adds to answer `index`."""
        return self._event([{"index": index, "delta": delta, "finish_reason": finish}])

    def usage_chunk(self, told: Sequence[Telling], prompt_tokens: int) -> str:
        return self._event([], usage=usage(told, prompt_tokens))

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps({**self._head('chat.completion.chunk'), 'choices': choices, **more})}\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(told: Sequence[Telling], prompt_tokens: int) -> dict[str, int]:
    made = sum(one.tokens for one in told)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": made,
        "total_tokens": prompt_tokens + made,
    }
