"""Access control for all routes and websockets: host, origin, API key, content type.

Any page open in a browser may send requests to a loopback server, and an attacker may point a
domain name at 127.0.0.1 (DNS rebinding). So the Host header must name this server, an Origin header
must be this server's own or an allowed one, and a request with a body must be declared as JSON,
which a page of another origin cannot do without a CORS preflight. All checks use the headers only
and precede reading a body.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blm.addresses import read_authority
from blm.serving.access.connections import TrackedConnection
from blm.serving.access.keys import DEFAULT_PORTS, SECURITY_HEADERS, AccessControl, Origin, read_origin
from blm.serving.access.login import FORM, LOGIN_PATH, LOGOUT_PATH, PAGE_PATH, login_page
from blm.serving.errors import RequestError

log = logging.getLogger(__name__)
STATUS_PATHS = frozenset({"/health", "/healthz", "/ping"})
"""Paths for orchestrators: they need no key, and answer even when too many connections are busy."""
KEYLESS_PATHS = STATUS_PATHS | {LOGIN_PATH}
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})


class AccessMiddleware:
    """ASGI middleware; checks host, origin, key and content type, in this order."""

    def __init__(self, app: ASGIApp, *, access: AccessControl) -> None:
        self.app, self.access, self.host_policy = app, access, access.host_policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        async def send_secured(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                secure(message)
            await send(message)

        request = HTTPConnection(scope)
        # absent when the app runs without `connections.HttpProtocol`, as in a test client
        connection: TrackedConnection | None = scope.get("state", {}).get("connection")
        refusal: Response | None = None
        try:
            self.check(request)
            if connection is not None and scope["path"] not in STATUS_PATHS:
                authenticated = self.access.has_valid_key(request)
                connection.table.enter(connection, authenticated=authenticated, keys=self.access.needs_key)
        except RequestError as error:
            refusal = _refusal(request, error)
        if refusal is not None:
            await _deny(refusal, scope, receive, send_secured)
            return
        try:
            await self.app(scope, receive, send_secured)
        finally:
            if connection is not None:
                connection.table.leave(connection)

    def check(self, connection: HTTPConnection) -> None:
        """Raise RequestError 400, 421, 403, 401 or 415 for a request that is not allowed."""
        scope = connection.scope
        websocket = scope["type"] == "websocket"
        method = "GET" if websocket else scope["method"]
        origin = self._check_host(connection)
        foreign = self._check_origin(connection, origin, websocket or method not in _SAFE_METHODS)
        preflight = foreign and method == "OPTIONS"
        if scope["path"] not in KEYLESS_PATHS and not preflight:
            if foreign and "authorization" not in connection.headers:  # cookies count for own pages only
                if self.access.needs_key:
                    raise RequestError(401, "wrong or missing API key", code="invalid_api_key")
            else:
                self.access.require(connection)
        if method in _BODY_METHODS:
            _check_content_type(connection)

    def _check_host(self, connection: HTTPConnection) -> Origin:
        """Return the server's own origin as the client addressed it.

        Raises RequestError 400 or 421.
        """
        values = connection.headers.getlist("host")
        if len(values) != 1:
            raise RequestError(400, f"a request needs exactly one Host header, got {len(values)}")
        if not connection.scope["path"].startswith("/") and connection.scope.get("method") != "OPTIONS":
            raise RequestError(400, "the request target must begin with '/': this server is not a proxy")
        try:
            host, port = read_authority(values[0].strip())
        except ValueError as error:
            raise RequestError(400, f"malformed Host header: {error}") from None
        if not self.host_policy.knows_host(host):
            message = (
                f"'{host[:80]}' is not a name of this server; to allow it, start the server with "
                f"--allowed-host {host[:80]}"
            )
            raise RequestError(421, message, code="unknown_host")
        scheme = "https" if connection.scope["scheme"] in ("https", "wss") else "http"
        return scheme, host, port or DEFAULT_PORTS[scheme]

    def _check_origin(self, connection: HTTPConnection, own: Origin, costly: bool) -> bool:
        """Return whether the request is from a page of another, allowed origin.

        Raises RequestError 403. Programs other than browsers send no Origin header.
        """
        origins, site = connection.headers.getlist("origin"), connection.headers.get("sec-fetch-site")
        if not origins:
            opened = not costly and connection.headers.get("sec-fetch-mode") == "navigate"
            if site is not None and site not in ("same-origin", "none") and not opened:
                raise RequestError(403, f"request from another origin (Sec-Fetch-Site: {site[:40]})")
            return False
        page = read_origin(origins[0]) if len(origins) == 1 else None
        if page is not None and page == own:
            return False
        if page is not None and page in self.host_policy.origins:
            return True
        shown = ", ".join(origins)[:80]
        message = f"origin '{shown}' is not allowed; to allow it, start the server with --allowed-origin"
        raise RequestError(403, message, code="foreign_origin")


def secure(message: Message) -> None:
    """Add SECURITY_HEADERS to the start of a response, but keep a route's own policy."""
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
        given = f"'{', '.join(values)[:80]}'" if values else "no Content-Type"
        raise RequestError(415, f"the Content-Type must be {' or '.join(accepted)} in UTF-8, got {given}")


def _refusal(connection: HTTPConnection, error: RequestError) -> Response:
    """Return the response for an error; for a browser at the playground, the login page."""
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
    """Send a refusal; for a websocket, as the response to its handshake."""
    if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008})
        return
    await refusal(scope, receive, send)
