"""HTTP errors in OpenAI's format."""

from __future__ import annotations

from typing import Any

from blm.types import BlmError, shorten

QUOTED_CHARACTERS = 60
"""Maximum length of a client's value in an error message [characters]."""
MESSAGE_CHARACTERS = 500
"""Maximum length of an error message [characters]."""


class RequestError(BlmError):
    """A request that cannot be served: HTTP status, message, and the faulty parameter."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(shorten(message, MESSAGE_CHARACTERS, quote=False))
        self.status, self.code = status, code
        self.param = None if param is None else shorten(param, QUOTED_CHARACTERS, quote=False)

    def to_json(self) -> dict[str, Any]:
        """Return the body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def quoted(value: object) -> str:
    """Return a JSON value of a request for an error message: short, and in the terms of JSON."""
    if isinstance(value, str):
        return f"'{shorten(value, QUOTED_CHARACTERS, quote=False)}'"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value) if abs(value) < 10**40 else "an integer of more than 40 digits"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict):
        return "an object"
    return f"a list of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"
