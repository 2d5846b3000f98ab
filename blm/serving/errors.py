"""Errors of requests in OpenAI's form, and values shortened for messages."""

from __future__ import annotations

from typing import Any

from blm.types import BlmError

QUOTED_CHARACTERS = 60
"""Of a client's value in an error message: enough to recognise it, and no echo of a megabyte."""
MESSAGE_CHARACTERS = 500
"""Longest error message."""


class RequestError(BlmError):
    """A request that cannot be served: an HTTP status, and which parameter is at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(shortened(message, MESSAGE_CHARACTERS))
        self.status, self.code = status, code
        self.param = None if param is None else shortened(param, QUOTED_CHARACTERS)

    def to_json(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def shortened(text: str, most: int = QUOTED_CHARACTERS) -> str:
    """Return `text` on one line, cut to `most` characters."""
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return cut if cut.isprintable() else "".join(c if c.isprintable() else " " for c in cut)


def quoted(value: object) -> str:
    """Return how a value of a request reads in an error message, whatever its size."""
    if isinstance(value, str):
        return f"'{shortened(value)}'"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value) if abs(value) < 10**40 else "an integer of more than 40 digits"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict):
        return "an object"
    return f"a list of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"
