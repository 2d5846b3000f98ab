"""Models under test by name: our checkpoint, any transformers image-text-to-text model, any endpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from blm.backbone import BACKBONES, Backbone
from blm.evaluation.digital.endpoint import Endpoint, Settings
from blm.hub import BLM
from blm.policy.checkpoint import RELEASES, folder_of
from blm.types import BlmError, Chat, UnknownNameError

HELP = "a checkpoint or backbone folder, a backbone's name, or openai:MODEL@URL (URL ends in /v1)"
SCHEME = "openai:"
KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Named:
    """A chat and what names its weights."""

    chat: Chat
    name: str
    """Of the weights: a fingerprint, or MODEL@URL."""


def find_chat(
    name: str,
    *,
    device: str = "cpu",
    api_key: str | None = None,
    cache: Path | None = None,
    settings: Settings | None = None,
) -> Named:
    """Load what `name` says. Raises UnknownNameError with the choices, BlmError for a malformed address.

    `api_key` (else the environment's OPENAI_API_KEY), `cache` and `settings` are for endpoints.
    """
    if name.startswith(SCHEME):
        endpoint = find_endpoint(name, api_key=api_key, cache=cache, settings=settings)
        return Named(endpoint, endpoint.name)
    folder = Path(name)
    if (folder_of(name) / "manifest.json").exists():
        model = BLM.from_pretrained(name, device=device)
        return Named(model.backbone, model.contract.revision)
    if not folder.is_dir() and name not in BACKBONES:
        raise UnknownNameError("model", name, [*RELEASES, *BACKBONES, "<a folder>", "openai:MODEL@URL"])
    backbone = Backbone.load(name, device=device)
    return Named(backbone, backbone.fingerprint()[:16])


def find_endpoint(
    name: str, *, api_key: str | None = None, cache: Path | None = None, settings: Settings | None = None
) -> Endpoint:
    """Open 'openai:MODEL@URL'; nothing is sent yet."""
    model, _, url = name.removeprefix(SCHEME).rpartition("@")
    if not model or not url.startswith(("http://", "https://")):
        raise BlmError(f"endpoint '{name}' is not of the form openai:MODEL@http://HOST:PORT/v1")
    key = api_key or os.environ.get(KEY_VARIABLE)
    return Endpoint(model, url, api_key=key, cache=cache, settings=settings)
