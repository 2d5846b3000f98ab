"""Login for browsers: a form that sets a cookie.

Browsers cannot send an API key with a page or a websocket. The cookie holds a random token, not the
key. It is HttpOnly and SameSite=Strict, and the access middleware accepts it from pages of this
server only.
"""

from __future__ import annotations

import html
import json
import math
from importlib.resources import files
from urllib.parse import parse_qs

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse

from blm.serving.access.keys import SESSION_S, AccessControl, cookie_name
from blm.serving.errors import RequestError

PAGE_PATH, LOGIN_PATH, LOGOUT_PATH = "/playground", "/playground/login", "/playground/logout"
FORM = "application/x-www-form-urlencoded"
MAX_BODY = 8192
"""Maximum size of a login request [bytes]."""
FORM_POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'"


def login_page(message: str = "", status: int = 401) -> HTMLResponse:
    """Return the login form, login.html, with `message` in place of {{MESSAGE}}."""
    page = files("blm.serving.playground").joinpath("login.html").read_text("utf-8")
    return HTMLResponse(
        page.replace("{{MESSAGE}}", html.escape(message)),
        status,
        {"Content-Security-Policy": FORM_POLICY, "Cache-Control": "no-store", "WWW-Authenticate": "Bearer"},
    )


def add_login(app: FastAPI, access: AccessControl) -> None:
    """Add the login and logout routes. The middleware has already checked host and origin."""

    @app.post(LOGIN_PATH, include_in_schema=False)
    async def login(request: Request) -> Response:
        address = request.client.host if request.client else ""
        if wait := math.ceil(access.login_limit.wait_s(address)):
            message = f"too many failed logins from this address; try again in {wait} s"
            return _refusal(request, RequestError(429, message), {"Retry-After": str(wait)})
        given = await _read_key(request)
        if access.needs_key and not access.accepts(given):
            access.login_limit.count(address)
            return _refusal(request, RequestError(401, "wrong API key", code="invalid_api_key"))
        reply = _done(request)
        if access.needs_key:
            _set_cookie(request, reply, access.sessions.start(), SESSION_S)
        return reply

    @app.post(LOGOUT_PATH, include_in_schema=False)
    async def logout(request: Request) -> Response:
        access.sessions.end(request.cookies.get(cookie_name(request), ""))
        reply = _done(request)
        _set_cookie(request, reply, "", 0)
        return reply


def _set_cookie(request: Request, reply: Response, token: str, lifetime_s: float) -> None:
    origin = request.headers.get("origin", "")  # behind a TLS proxy only the browser knows the scheme
    reply.set_cookie(
        cookie_name(request),
        token,
        max_age=int(lifetime_s),
        path="/",
        secure=request.url.scheme == "https" or origin.startswith("https://"),
        httponly=True,
        samesite="strict",
    )
    reply.headers["Cache-Control"] = "no-store"


async def _read_key(request: Request) -> str:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY:
            raise RequestError(413, f"the request body is larger than {MAX_BODY} bytes")
    try:
        text = body.decode()
        if _is_form(request):
            return parse_qs(text, max_num_fields=4).get("key", [""])[0].strip()
        given = json.loads(text)["key"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RequestError(400, "the body must be a form or JSON with the field 'key'", "key") from None
    if not isinstance(given, str):
        raise RequestError(400, "'key' must be text", "key")
    return given.strip()


def _is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == FORM


def _done(request: Request) -> Response:
    return RedirectResponse(PAGE_PATH, 303) if _is_form(request) else JSONResponse({"done": True})


def _refusal(request: Request, error: RequestError, headers: dict[str, str] | None = None) -> Response:
    if _is_form(request):
        page = login_page(str(error), error.status)
        page.headers.update(headers or {})
        return page
    return JSONResponse(error.to_json(), error.status, headers)
