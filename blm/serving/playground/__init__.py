"""One page to watch a served model drive a simulated robot, disturb it, and ask about what it sees.

Everything goes through the protocols that any client uses: the simulated robot asks for actions
over OpenPI's websocket, the page asks questions over chat completions. With an API key the server's
gate lets in only browsers that have signed in, and a websocket only with their cookie or the key:
nobody waits in here without.
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
from blm.serving.playground.session import Session, Simulators, own_address
from blm.tasks import TASKS
from blm.types import BlmError, PolicyContract

PATH = "/playground"
MAX_VISITORS = 4
"""Visitors at a time; each may hold two simulators."""
EVICTABLE_S = 60.0
"""When all places are taken, a visitor who was idle for so long gives his to a new one."""


def add_playground(
    app: FastAPI,
    contract: PolicyContract | None,
    *,
    name: str,
    beside: Mapping[str, str] | None = None,
    beside_key: str | None = None,
) -> None:
    """Add the page to a server that `create_app` made.

    Without a `contract` (a model that has no policy) scenes can be looked at and asked about, not
    driven. `beside`: name -> ws:// address of other servers to compare with; they get `beside_key`
    and never a key of this server. Raises BlmError when one of them has this server's name.
    """
    if name in (beside or {}):
        raise BlmError(f"--beside names another server '{name}', as this one is called; choose another name")
    others = {other: ServedModel(uri=uri, api_key=beside_key) for other, uri in (beside or {}).items()}
    facts = page_facts(app, contract, name, list(others))
    template = files(__package__).joinpath("page.html").read_text("utf-8")
    template = template.replace("{{FACTS}}", json.dumps(facts).replace("<", "\\u003c"))
    sessions, simulators = set[Session](), Simulators()

    @app.get(PATH)
    async def get_page() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        headers = {"Content-Security-Policy": content_policy(nonce), "Cache-Control": "no-store"}
        return HTMLResponse(template.replace("{{NONCE}}", nonce), headers=headers)

    async def visit(socket: WebSocket) -> None:
        await socket.accept()
        if len(sessions) >= MAX_VISITORS:
            idlest = max(sessions, key=lambda session: session.idle_s)
            if idlest.idle_s < EVICTABLE_S:
                message = f"{MAX_VISITORS} visitors are here already; try again later"
                await socket.send_json({"type": "error", "message": message})
                await socket.close(1013, message)
                return
            sessions.discard(idlest)
            idlest.request_close(1000, "another visitor took the place of this idle page")
        own = own_address(socket.scope.get("server")) if contract is not None else None
        model = ServedModel(uri=own, contract=contract, api_key=app.state.access.internal_key)
        session = Session(socket, {name: model, **others}, simulators)
        sessions.add(session)
        try:
            await session.run()
        finally:
            sessions.discard(session)

    app.add_api_websocket_route(f"{PATH}/ws", visit)


def page_facts(
    app: FastAPI, contract: PolicyContract | None, name: str, others: Sequence[str]
) -> dict[str, Any]:
    """What the page needs to know about model, scenes and server."""
    robots = [robot for robot in ROBOTS if contract is None or robot in contract.action_spaces]
    return {
        "model": name,
        "models": [name, *others],
        "revision": contract.revision if contract else "",
        "policy": contract is not None,
        "chat": "chat" in app.state.serves,
        "robots": robots,
        "tasks": {task: spec.title for task, spec in TASKS.items()},
        "key": app.state.access.needs_key,
    }


def content_policy(nonce: str) -> str:
    """The page runs its own script and style only, loads nothing from elsewhere, and stands in no
    frame."""
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
    """Read NAME=ws://HOST:PORT. Raises BlmError for anything else, and for a name given twice."""
    found = dict[str, str]()
    for entry in entries:
        name, _, address = entry.partition("=")
        if not name or name in found or not address.startswith(("ws://", "wss://")):
            raise BlmError(f"'{entry}' is not of the form NAME=ws://HOST:PORT with a name of its own")
        found[name] = address
    return found
