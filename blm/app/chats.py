"""Load chat models by name: checkpoints, transformers models, OpenAI endpoints."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from blm.app.model import find_model
from blm.backbone.precision import WeightDtype, require_attention
from blm.evaluation.digital.endpoint import Endpoint, EndpointSettings
from blm.types import BlmError, Chat

HELP = "a checkpoint or backbone folder, a backbone's name or hub id, or openai:MODEL@URL (URL ends in /v1)"
SCHEME = "openai:"
KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True)
class LoadedChat:
    """A chat model and the identity of its weights."""

    chat: Chat
    revision: str
    """Fingerprint of the weights, or MODEL@URL of an endpoint."""


def load_chat(
    name: str,
    *,
    device: str = "cpu",
    dtype: WeightDtype | None = None,
    attn_implementation: str | None = None,
    api_key: str | None = None,
    cache: Path | None = None,
    settings: EndpointSettings | None = None,
) -> LoadedChat:
    """Load a chat model by its name.

    `api_key` (by default the environment variable OPENAI_API_KEY), `cache` and `settings` are for
    endpoints. Raises UnknownNameError, which lists the valid names, and BlmError for a policy that
    cannot chat.
    """
    if name.startswith(SCHEME):
        endpoint = open_endpoint(name, api_key=api_key, cache=cache, settings=settings)
        return LoadedChat(endpoint, endpoint.name)
    require_attention(attn_implementation)
    source = find_model(
        name, what="model", others=["<a folder>", "<an id of the Hugging Face hub>", "openai:MODEL@URL"]
    )
    if not source.has_chat:
        raise BlmError(f"'{name}' is a {source.kind}: it controls robots and cannot chat; give {HELP}")
    model = source.load(device, dtype=dtype, attn_implementation=attn_implementation)
    assert model.chat is not None
    revision = model.chat.fingerprint()[:16] if model.policy is None else model.policy.contract.revision
    return LoadedChat(model.chat, revision)


def open_endpoint(
    name: str,
    *,
    api_key: str | None = None,
    cache: Path | None = None,
    settings: EndpointSettings | None = None,
) -> Endpoint:
    """Return the endpoint 'openai:MODEL@URL'. Raises BlmError for any other form."""
    model, _, url = name.removeprefix(SCHEME).rpartition("@")
    if not model or not url.startswith(("http://", "https://")):
        raise BlmError(f"endpoint '{name}' must have the form openai:MODEL@http://HOST:PORT/v1")
    key = api_key or os.environ.get(KEY_VARIABLE)
    return Endpoint(model, url, api_key=key, cache=cache, settings=settings)
