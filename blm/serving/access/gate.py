"""The gate before all routes: which hosts, origins, keys and content types pass. Pure ASGI, websockets too.

Any page that a browser has open may send requests to a loopback server, and a name of the attacker's may be
pointed at 127.0.0.1 ("DNS rebinding"). So the Host header must name this server, an Origin header must be
this server's own, and requests with a body must be declared as JSON, which a foreign page cannot do without
asking first. Everything is decided from the headers: no body is read for who may not send one.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blm.addresses import read_authority
from blm.serving.access.connections import Connection
from blm.serving.access.keys import DEFAULT_PORTS, SECURITY_HEADERS, Access, Origin, read_origin
from blm.serving.access.login import FORM, LOGIN_PATH, LOGOUT_PATH, PAGE_PATH, login_page
from blm.serving.errors import RequestError

log = logging.getLogger(__name__)
STATUS_PATHS = frozenset({"/health", "/healthz", "/ping"})
"""They answer without a key, and when all places are taken: orchestrators ask here."""
KEYLESS_PATHS = STATUS_PATHS | {LOGIN_PATH}
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})


class Gate:
    """ASGI middleware: checks in the order host, origin, key, content type; see the module's docstring."""

    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        self.app, self.access, self.trust = app, access, access.trust

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        async def send_secured(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                secure(message)
            await send(message)

        request = HTTPConnection(scope)
        place: Connection | None = scope.get("state", {}).get("connection")  # none without our own server
        refusal: Response | None = None
        try:
            self.check(request)
            if place is not None and scope["path"] not in STATUS_PATHS:
                shown = self.access.shows_key(request)
                place.table.enter(place, trusted=shown, keys=self.access.needs_key)
        except RequestError as error:
            refusal = _refusal(request, error)
        if refusal is not None:
            await _deny(refusal, scope, receive, send_secured)
            return
        try:
            await self.app(scope, receive, send_secured)
        finally:
            if place is not None:
                place.table.leave(place)

    def check(self, connection: HTTPConnection) -> None:
        """Raise RequestError 400, 421, 403, 401 or 415 for what may not pass."""
        scope = connection.scope
        websocket = scope["type"] == "websocket"
        method = "GET" if websocket else scope["method"]
        origin = self._check_host(connection)
        foreign = self._check_origin(connection, origin, websocket or method not in _SAFE_METHODS)
        preflight = foreign and method == "OPTIONS"
        if scope["path"] not in KEYLESS_PATHS and not preflight:
            if foreign and "authorization" not in connection.headers:  # a cookie is for pages of this server
                if self.access.needs_key:
                    raise RequestError(401, "wrong or missing API key", code="invalid_api_key")
            else:
                self.access.require(connection)
        if method in _BODY_METHODS:
            _check_content_type(connection)

    def _check_host(self, connection: HTTPConnection) -> Origin:
        """Return the server's own origin, as the client addressed it."""
        values = connection.headers.getlist("host")
        if len(values) != 1:
            raise RequestError(400, f"a request needs exactly one Host header, got {len(values)}")
        if not connection.scope["path"].startswith("/") and connection.scope.get("method") != "OPTIONS":
            raise RequestError(400, "the request target must begin with '/': this server is no proxy")
        try:
            host, port = read_authority(values[0].strip())
        except ValueError as error:
            raise RequestError(400, f"malformed Host header: {error}") from None
        if not self.trust.knows_host(host):
            message = (
                f"this server does not go by the name '{host[:80]}'; start it with --allowed-host {host[:80]}"
            )
            raise RequestError(421, message, code="unknown_host")
        scheme = "https" if connection.scope["scheme"] in ("https", "wss") else "http"
        return scheme, host, port or DEFAULT_PORTS[scheme]

    def _check_origin(self, connection: HTTPConnection, own: Origin, costly: bool) -> bool:
        """Return whether an allowed page of another origin asks. Programs send no Origin."""
        origins, site = connection.headers.getlist("origin"), connection.headers.get("sec-fetch-site")
        if not origins:
            opened = not costly and connection.headers.get("sec-fetch-mode") == "navigate"
            if site is not None and site not in ("same-origin", "none") and not opened:
                raise RequestError(403, f"a page of another origin asked (Sec-Fetch-Site: {site[:40]})")
            return False
        page = read_origin(origins[0]) if len(origins) == 1 else None
        if page is not None and page == own:
            return False
        if page is not None and page in self.trust.origins:
            return True
        shown = ", ".join(origins)[:80]
        message = f"pages of '{shown}' may not use this server; start it with --allowed-origin to let them"
        raise RequestError(403, message, code="foreign_origin")


def secure(message: Message) -> None:
    """Add SECURITY_HEADERS to the start of a response; a policy of the route's own keeps its other rules."""
    headers = MutableHeaders(scope=message)
    policy = headers.get("content-security-policy")
    for name, value in SECURITY_HEADERS.items():
        headers.setdefault(name, value)
    if policy is not None and "frame-ancestors" not in policy:
        headers["content-security-policy"] = f"{policy}; {SECURITY_HEADERS['Content-Security-Policy']}"


def _check_content_type(connection: HTTPConnection) -> None:
    values = connection.headers.getlist("content-type")
    kind, *parameters = [part.strip().lower() for part in (values[0] if values else "").split(";")]
    accepted = ["application/json"]
    if connection.scope["path"] in (LOGIN_PATH, LOGOUT_PATH):
        accepted.append(FORM)
    charsets = [
        value.strip("\"' ") for name, _, value in (p.partition("=") for p in parameters) if name == "charset"
    ]
    if (
        len(values) != 1
        or kind not in accepted
        or any(charset not in ("utf-8", "utf8") for charset in charsets)
    ):
        given = f"'{', '.join(values)[:80]}'" if values else "none"
        raise RequestError(415, f"the Content-Type must be {' or '.join(accepted)} in UTF-8, got {given}")


def _refusal(connection: HTTPConnection, error: RequestError) -> Response:
    scope = connection.scope
    if error.status == 401 and scope["type"] == "http" and scope["method"] in ("GET", "HEAD"):
        app: Any = scope.get("app")
        if scope["path"] == PAGE_PATH and any(
            getattr(route, "path", None) == PAGE_PATH for route in app.routes
        ):
            return login_page()
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse(error.to_json(), error.status, headers)


async def _deny(refusal: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Send a refusal; to a websocket as the answer to its handshake."""
    if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008})
        return
    await refusal(scope, receive, send)
