"""The playground: a web page on which the served model controls a simulated robot and chats.

It uses the same protocols as any client: the simulated robot requests actions over OpenPI's
websocket, and the page asks questions over chat completions. On a server with API keys, the access
middleware admits only browsers that have logged in, and websockets only with their cookie or a key.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, WebSocket
from fastapi.responses import HTMLResponse

from blm.robots import ROBOTS
from blm.serving.playground.rollout import ServedModel
from blm.serving.playground.session import Simulators, VisitorSession, own_address
from blm.tasks import SUITE24, TASKS, WORDS
from blm.types import BlmError, PolicyContract

PATH = "/playground"
MAX_VISITORS = 4
"""Maximum number of visitors at a time; each may run two simulators."""
EVICTABLE_S = 60.0
"""Idle time after which a visitor may be disconnected to admit a new one [s]."""


def add_playground(
    app: FastAPI,
    contract: PolicyContract | None,
    *,
    name: str,
    beside: Mapping[str, str] | None = None,
    beside_key: str | None = None,
) -> None:
    """Add the page to a server from `create_app`.

    Without a `contract` (a model without a policy), scenes can be viewed and asked about, but not
    controlled. `beside`: name -> ws:// address of other servers to compare with; they receive
    `beside_key` and never a key of this server. Raises BlmError if one of them has this server's
    name.
    """
    if name in (beside or {}):
        raise BlmError(f"--beside: '{name}' is the name of this server; choose another name")
    others = {other: ServedModel(uri=uri, api_key=beside_key) for other, uri in (beside or {}).items()}
    facts = page_facts(app, contract, name, list(others))
    template = files(__package__).joinpath("page.html").read_text("utf-8")
    template = template.replace("{{FACTS}}", json.dumps(facts).replace("<", "\\u003c"))
    sessions, simulators = set[VisitorSession](), Simulators()

    @app.get(PATH)
    async def get_page() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        headers = {"Content-Security-Policy": content_policy(nonce), "Cache-Control": "no-store"}
        return HTMLResponse(template.replace("{{NONCE}}", nonce), headers=headers)

    async def visit(socket: WebSocket) -> None:
        await socket.accept()
        if not make_room(sessions):
            message = f"the playground is full ({MAX_VISITORS} visitors); try again later"
            await socket.send_json({"type": "error", "message": message})
            await socket.close(1013, message)
            return
        own = own_address(socket.scope.get("server")) if contract is not None else None
        model = ServedModel(uri=own, contract=contract, api_key=app.state.access.internal_key)
        session = VisitorSession(socket, {name: model, **others}, simulators)
        sessions.add(session)
        try:
            await session.run()
        finally:
            sessions.discard(session)

    app.add_api_websocket_route(f"{PATH}/ws", visit)


def make_room(sessions: set[VisitorSession]) -> bool:
    """Return whether another visitor may come; close the page of an idle one if that is needed."""
    if len(sessions) < MAX_VISITORS:
        return True
    idlest = max(sessions, key=lambda session: session.idle_s)
    if idlest.idle_s < EVICTABLE_S:
        return False
    sessions.discard(idlest)
    idlest.request_close(1000, "this idle page was closed for another visitor")
    return True


def page_facts(
    app: FastAPI, contract: PolicyContract | None, name: str, others: Sequence[str]
) -> dict[str, Any]:
    """Return the data of the page: model, scenes and server."""
    robots = [robot for robot in ROBOTS if contract is None or robot in contract.action_spaces]
    return {
        "model": name,
        "models": [name, *others],
        "revision": contract.revision if contract else "",
        "policy": contract is not None,
        "chat": "chat" in app.state.serves,
        "robots": robots,
        "tasks": {task: TASKS[task].title for task in SUITE24},
        "words": {task: TASKS[task].title for task in WORDS},
        "key": app.state.access.needs_key,
    }


def content_policy(nonce: str) -> str:
    """Return the Content-Security-Policy of the page: own script and style only, no frames."""
    return "; ".join([
        "default-src 'none'",
        "connect-src 'self'",
        "img-src data:",
        f"script-src 'nonce-{nonce}'",
        f"style-src 'nonce-{nonce}'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ])  # fmt: skip


def read_beside(entries: Sequence[str]) -> dict[str, str]:
    """Parse NAME=ws://HOST:PORT. Raises BlmError for another form or a duplicate name."""
    found = dict[str, str]()
    for entry in entries:
        name, _, address = entry.partition("=")
        if not name or name in found or not address.startswith(("ws://", "wss://")):
            raise BlmError(f"'{entry}' is not of the form NAME=ws://HOST:PORT with a unique name")
        found[name] = address
    return found
