"""Request bodies: read with limits on time and memory, then parsed as limited JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from blm.serving.access import connections
from blm.serving.errors import RequestError, quoted

Model = TypeVar("Model", bound=BaseModel)
_BOM = b"\xef\xbb\xbf"


class MemoryBudget:
    """Memory limit of all requests in progress [bytes]. Use it in the event loop only."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0


class Reservation:
    """The part of the memory budget that one request holds, until `release`."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget, self.held = budget, 0

    def hold(self, size: int) -> None:
        """Change the reservation to `size` bytes.

        Raises RequestError 503 if other requests hold too much. A request that is alone may exceed
        the budget, since it would never be answered otherwise.
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
    """Read a body of at most `most` bytes.

    Raises RequestError with status 408 (too slow), 413 (too large) or 503 (no memory).
    """
    too_large = RequestError(413, f"the request body is larger than {most} bytes", None, "body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(connections.REQUEST_TIMEOUT_S):
            async for piece in request.stream():
                if len(body) + len(piece) > most:
                    raise too_large
                reservation.hold(len(body) + len(piece))
                body += piece
    except TimeoutError:
        message = f"the request body did not arrive within {connections.REQUEST_TIMEOUT_S:g} s"
        raise RequestError(408, message) from None
    return body


def load_object(body: bytes | bytearray, most_values: int) -> dict[str, Any]:
    """Parse a JSON object of at most `most_values` values.

    Raises RequestError with status 400. Values are counted by the characters ',', '[' and '{',
    including those inside strings: base64 contains none of them, and the length of texts is limited
    anyway. Of duplicate names the last value counts, as in JavaScript.
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
        raise RequestError(400, f"the request body is {quoted(document)}; expected a JSON object")
    return document


def validated(kind: type[Model], document: Mapping[str, Any]) -> Model:
    """Validate a JSON object as a request.

    Raises RequestError with status 400 that names the invalid field.
    """
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        # pydantic reports one error per alternative of a union: show the alternative that came
        # closest
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
    """Return the path of the invalid field, without pydantic's names of union alternatives."""
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
