"""Who may use the server."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from blm.serving.errors import RequestError

PATIENCE_S = 20.0
"""A client has this long to say what it wants, and then to send it."""


def require_key(headers: Mapping[str, str], api_key: str | None) -> None:
    """OpenAI clients send 'Bearer <key>', OpenPI clients 'Api-Key <key>'."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    known = scheme.lower() in ("bearer", "api-key")
    if api_key is not None and not (known and hmac.compare_digest(given.encode(), api_key.encode())):
        raise RequestError(401, "wrong or missing API key", code="invalid_api_key")
