"""Request schemas in OpenAI's format: supported, ignored and unsupported fields.

A field that would change the answer and is not supported is refused by name, unless it has its
default. If it were ignored, a client would take the answer for a different one.
"""

from __future__ import annotations

import difflib
import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, Strict

from blm.serving.errors import QUOTED_CHARACTERS, RequestError, quoted
from blm.types import Sampling

DEFAULT_MAX_TOKENS = 256
MAX_ANSWERS = 8
"""Maximum of `n`, the number of answers to one request."""
MAX_STOPS = 16
"""Maximum number of stop strings; OpenAI allows 4."""
MAX_STOP_CHARACTERS = 256
GREEDY_TEMPERATURE = 1e-5
"""Temperature below which decoding is greedy, as in vLLM (`_SAMPLING_EPS`).

Smaller divisors overflow.
"""
SMALLEST_TOP_P = 1e-9
"""Replacement of `top_p: 0`, which OpenAI accepts: only the likeliest token remains."""

Int = Annotated[int, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict()]


class ImageUrl(BaseModel):
    url: Text


class TextPart(BaseModel):
    """Text; `input_text` and `output_text` are the names in OpenAI's Responses API."""

    type: Literal["text", "input_text", "output_text"]
    text: Text


class RefusalPart(BaseModel):
    """A refusal in an earlier answer of another model."""

    type: Literal["refusal"]
    refusal: Text


class ImagePart(BaseModel):
    """An image. `detail` is ignored: images are preprocessed as in training."""

    type: Literal["image_url", "input_image"]
    image_url: ImageUrl | Text


Part = Annotated[TextPart | RefusalPart | ImagePart, Field(discriminator="type")]


class Function(BaseModel):
    name: Text = ""
    arguments: Text = ""


class ToolCall(BaseModel):
    id: Text | None = None
    function: Function | None = None


class ChatMessage(BaseModel):
    """One message; other fields are ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: Text | None = None
    tool_call_id: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    function_call: Function | None = None


class StreamOptions(BaseModel):
    include_usage: Flag | None = None
    continuous_usage_stats: Flag | None = None


Stop = Annotated[Text, Field(max_length=MAX_STOP_CHARACTERS)]


class ChatCompletionRequest(BaseModel):
    """The supported fields of a chat request."""

    model: Text
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_tokens: Int | None = Field(None, ge=1)
    max_completion_tokens: Int | None = Field(None, ge=1)
    """The newer name, which takes precedence.

    Both are capped at the model's context length.
    """
    temperature: Number | None = Field(None, ge=0, le=2)
    """Default: greedy decoding, because questions about a scene have one answer."""
    top_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = Field(None, ge=0.1, le=2)
    seed: Int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    n: Int | None = Field(None, ge=1, le=MAX_ANSWERS)
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    separate_reasoning: Flag | None = None
    """True: reasoning in `reasoning_content`; false: in the text.

    The default is the server's setting.
    """
    include_reasoning: Flag | None = None
    """False removes the reasoning from the reply."""

    def samplings(self, context_tokens: int) -> list[Sampling]:
        """Return the sampling parameters of each of the `n` answers.

        Answer i uses the seed `seed + i`.
        """
        limit = self.max_completion_tokens or self.max_tokens or DEFAULT_MAX_TOKENS
        first = self.seed if self.seed is not None else secrets.randbits(62)
        temperature = self.temperature or 0.0
        top_p = 1.0 if self.top_p is None else max(self.top_p, SMALLEST_TOP_P)
        return [
            Sampling(
                max_tokens=min(limit, context_tokens),
                temperature=temperature if temperature >= GREEDY_TEMPERATURE else 0.0,
                top_p=top_p,
                repetition_penalty=self.repetition_penalty,
                seed=(first + number) % 2**63,
            )
            for number in range(self.n or 1)
        ]

    @property
    def stops(self) -> list[str]:
        return [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if stop]

    @property
    def includes_usage(self) -> bool:
        """Whether the last chunk of a stream carries the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream has the token counts so far, as in vLLM."""
        return self.includes_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )


class TokenizeRequest(BaseModel):
    """As in vLLM: tokenize a text, or messages with the chat template."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: Flag | None = None
    """For `prompt` only; default true.

    Messages have the special tokens of the chat template.
    """
    return_token_strs: Flag | None = None


class DetokenizeRequest(BaseModel):
    model: Text | None = None
    tokens: Annotated[list[Annotated[Int, Field(ge=0)]], Field(fail_fast=True)]


IGNORED = frozenset(
    (
        "user", "safety_identifier", "metadata", "service_tier", "prompt_cache_key", "prompt_cache_retention",
        "parallel_tool_calls", "reasoning_effort", "verbosity", "request_id", "priority", "cache_salt",
    )
)  # fmt: skip
"""Labels and hints that need not change the answer."""

DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "store": (False,),
    "web_search_options": (),
    "moderation": (),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "prompt_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "top_k": (0, -1),
    "min_p": (0,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "truncate_prompt_tokens": (),
    "echo": (False,),
    "suffix": ("",),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "documents": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "logits_processors": ([],),
    "kv_transfer_params": (),
    "vllm_xargs": (),
    "thinking": (),
    "enable_thinking": (),
    "thinking_token_budget": (),
}
"""Unsupported fields of OpenAI's and vLLM's requests -> accepted values, besides null."""


def check_fields(document: Mapping[str, Any], kind: type[BaseModel]) -> None:
    """Raise RequestError 400 for an unknown field, or an unsupported one without its default."""
    for name, value in document.items():
        if name in kind.model_fields or name in IGNORED:
            continue
        if name not in DEFAULTS:
            close = difflib.get_close_matches(name[:QUOTED_CHARACTERS], kind.model_fields, 1)
            hint = f"did you mean '{close[0]}'?" if close else f"supported: {', '.join(kind.model_fields)}"
            raise RequestError(400, f"unknown field {quoted(name)}; {hint}", name, "unknown_parameter")
        if value is not None and value not in DEFAULTS[name]:
            allowed = " or ".join(json.dumps(default) for default in (*DEFAULTS[name], None))
            message = f"{name}: {quoted(value)} is not supported by this server; accepted: {allowed}"
            raise RequestError(400, message, name, "unsupported_parameter")


def body_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """Return the `requestBody` of the OpenAPI document for a request schema."""
    schema = kind.model_json_schema()
    content = {"application/json": {"schema": _inlined(schema, schema.get("$defs", {}))}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: Any, parts: Mapping[str, Any]) -> Any:
    """Replace each `$ref` of a JSON schema by its definition.

    An OpenAPI operation cannot hold `$defs`.
    """
    if isinstance(schema, list):
        return [_inlined(value, parts) for value in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(parts[schema["$ref"].rpartition("/")[2]], parts)
    return {
        key: _inlined(value, parts) for key, value in schema.items() if key not in ("$defs", "discriminator")
    }
