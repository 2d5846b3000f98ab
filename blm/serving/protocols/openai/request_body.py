"""Bodies of requests: read within time and memory, then JSON whose size is known before it is parsed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from blm.serving.access import keys as access
from blm.serving.errors import RequestError, quoted

Model = TypeVar("Model", bound=BaseModel)
_BOM = b"\xef\xbb\xbf"


class MemoryBudget:
    """Bytes that all requests in progress may hold together. Belongs to the event loop's thread."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0


class Reservation:
    """One request's share of the budget, given back at the end of the `with` block."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget, self.held = budget, 0

    def hold(self, size: int) -> None:
        """Hold `size` bytes from now on. Raises RequestError with status 503 when others hold too much.

        A request that is alone may exceed the budget: it would never be answered otherwise.
        """
        others = self.budget.held - self.held
        if size > self.held and others and others + size > self.budget.limit:
            raise RequestError(
                503, "the server has too many large requests in progress; try again", None, "busy"
            )
        self.budget.held, self.held = others + size, size

    def release(self) -> None:
        self.hold(0)


async def read_body(request: Request, most: int, reservation: Reservation) -> bytearray:
    """Read a body of at most `most` bytes. Raises RequestError: 408 too slow, 413 too large, 503 no room."""
    too_large = RequestError(413, f"the request body is larger than {most} bytes", None, "body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(access.PATIENCE_S):
            async for piece in request.stream():
                if len(body) + len(piece) > most:
                    raise too_large
                reservation.hold(len(body) + len(piece))
                body += piece
    except TimeoutError:
        raise RequestError(408, f"the request body did not arrive within {access.PATIENCE_S:g} s") from None
    return body


def load_object(body: bytes | bytearray, most_values: int) -> dict[str, Any]:
    """Parse a JSON object of at most `most_values` values. Raises RequestError with status 400.

    Values are counted by the characters before them, also where those stand in a text: base64 has none of
    them, and texts are bounded anyway. A name that is given twice has its last value, as in JavaScript.
    """
    count = sum(body.count(mark) for mark in (b",", b"[", b"{"))
    if count > most_values:
        message = f"the request body has {count} of the characters ',', '[' and '{{'; at most {most_values}"
        raise RequestError(400, message)
    try:
        document = from_json(body.removeprefix(_BOM), allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(400, f"the request body is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise RequestError(400, f"the request body is {quoted(document)}; a JSON object is needed")
    return document


def validated(kind: type[Model], document: Mapping[str, Any]) -> Model:
    """Return the request in a JSON object. Raises RequestError with status 400, naming the field at fault."""
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        # of a field with several forms there is one error for each form: tell the nearest to what was meant
        found = max(
            error.errors(include_url=False),
            key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")),
        )
        raise _refusal(found, document) from error


def _refusal(found: ErrorDetails, document: Mapping[str, Any]) -> RequestError:
    where, missing = _path(found, document), found["type"] == "missing"
    if found["type"] == "union_tag_invalid":
        context = found["ctx"]
        accepted = context["expected_tags"]
        message = f"{where}.type: {quoted(context['tag'])} parts are not supported; accepted: {accepted}"
        return RequestError(400, message, f"{where}.type", "unsupported_part")
    given = "" if missing else f", got {quoted(found['input'])}"
    return RequestError(400, f"{where}: {found['msg']}{given}", where)


def _path(found: ErrorDetails, document: Mapping[str, Any]) -> str:
    """Return the field at fault as it stands in the document, without pydantic's names of alternatives."""
    node: Any = document
    path = list[str]()
    for number, step in enumerate(found["loc"]):
        inside = isinstance(node, dict) and step in node
        if inside or (isinstance(node, list) and isinstance(step, int) and step < len(node)):
            path.append(str(step))
            node = node[step]
        elif found["type"] == "missing" and number == len(found["loc"]) - 1:
            path.append(str(step))
    return ".".join(path) or "body"
