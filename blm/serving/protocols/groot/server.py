"""A server for Isaac-GR00T's PolicyClient: requests over ZeroMQ.

A request is msgpack {"endpoint", "data", "api_token"}. The reply to "get_action" is [actions,
info]; an error is {"error": message}; see `codec` for their contents. The endpoint "kill", with
which any client can stop GR00T's own server, is refused.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from fastapi import FastAPI

from blm.serving.access.keys import AccessControl
from blm.serving.protocols.disconnect import cancel_on_disconnect
from blm.serving.protocols.groot import codec
from blm.serving.protocols.groot.zmtp import ZmtpConnection, ZmtpRequest
from blm.serving.protocols.openpi import wire
from blm.serving.scheduler import ActionResult, ModelScheduler
from blm.types import ActionKind, BlmError, Observation, Policy, PolicyContract, shorten

log = logging.getLogger(__name__)
ENDPOINTS = ("get_action", "get_modality_config", "ping", "reset")
MAX_CLIENTS = 64
"""Maximum number of connections.

Beyond it, a new one replaces the oldest that has not sent a valid request yet.
"""
REQUEST_TIMEOUT_S = 20.0
"""Timeout of a client's first valid request, and of every further message [s].

The latter starts with the first byte.
"""
LONGEST_ERROR = 1000
"""Maximum length of an error message to a client [characters]."""
LARGE_AT_ONCE = 4
"""Maximum number of large messages that are read at the same time.

New and established connections have separate limits.
"""


def add_groot(app: FastAPI, policy: Policy, *, host: str = "127.0.0.1", port: int = 5555) -> None:
    """Let `app` also serve GR00T clients, with its scheduler and API keys.

    The startup of the app raises BlmError if the address is in use.
    """
    rest = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with rest(app) as state:
            groot = GrootServer(app.state.scheduler, policy.contract, app.state.access)
            try:
                listening = await asyncio.start_server(groot.serve, host, port)
            except OSError as error:
                raise BlmError(f"cannot listen for GR00T clients on {host}:{port}: {error}") from error
            async with listening:
                yield state
                listening.close()
                await groot.close()

    app.router.lifespan_context = lifespan


class GrootServer:
    """Serves GR00T clients; a connection has one request of at most MAX_ROWS rows at a time."""

    def __init__(self, scheduler: ModelScheduler, contract: PolicyContract, access: AccessControl) -> None:
        self._scheduler, self._contract = scheduler, contract
        self._accepts = access.accepts if access.needs_key else None
        self._limit = codec.message_limit(contract)
        self._new = dict[asyncio.Task[None], None]()
        """Tasks of the connections without a valid request so far, oldest first."""
        self._established = set[asyncio.Task[None]]()
        """Tasks of the other connections."""
        self._slots = asyncio.Semaphore(LARGE_AT_ONCE), asyncio.Semaphore(LARGE_AT_ONCE)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client until it disconnects."""
        task = asyncio.current_task()
        connection = ZmtpConnection(reader, writer)
        assert task is not None
        if not self._make_room():
            connection.close()
            return
        self._new[task] = None
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        address = writer.get_extra_info("peername")
        try:
            await self._serve_connection(connection, f"groot {address}", task)
        except (EOFError, OSError, TimeoutError, BlmError) as error:
            log.info("GR00T client %s disconnected: %s %s", address, type(error).__name__, shorten(error))
        except asyncio.CancelledError:
            log.info("GR00T client %s: connection closed by the server", address)
        finally:
            self._new.pop(task, None)
            self._established.discard(task)
            connection.close()

    async def close(self) -> None:
        """Close all connections."""
        tasks = [*self._new, *self._established]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _make_room(self) -> bool:
        if len(self._new) + len(self._established) < MAX_CLIENTS:
            return True
        if not self._new:
            return False
        oldest = next(iter(self._new))
        del self._new[oldest]
        oldest.cancel()
        return True

    async def _serve_connection(
        self, connection: ZmtpConnection, client: str, task: asyncio.Task[None]
    ) -> None:
        decoded: Mapping[str, Any] | None = None
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            await connection.handshake()
            while decoded is None:
                request = await connection.receive(self._limit, REQUEST_TIMEOUT_S, self._slots[0])
                decoded = await self._decode(connection, request)
        self._new.pop(task, None)
        self._established.add(task)
        receiving = self._start_receiving(connection)
        try:
            while True:
                if decoded is not None:
                    reply = await cancel_on_disconnect(self._answer(decoded, client), receiving)
                    await connection.send(request, reply)
                request = await receiving
                receiving = self._start_receiving(connection)
                decoded = await self._decode(connection, request)
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)

    def _start_receiving(self, connection: ZmtpConnection) -> asyncio.Task[ZmtpRequest]:
        return asyncio.create_task(connection.receive(self._limit, REQUEST_TIMEOUT_S, self._slots[1]))

    async def _decode(self, connection: ZmtpConnection, request: ZmtpRequest) -> Mapping[str, Any] | None:
        """Decode a request. For an invalid one, send the error and return None."""
        try:
            return codec.read_request(request.body, self._accepts)
        except BlmError as error:
            await connection.send(request, codec.pack({"error": shorten(error, LONGEST_ERROR)}))
            return None

    async def _answer(self, request: Mapping[str, Any], client: str) -> bytes:
        try:
            return codec.pack(await self._reply(request, client))
        except BlmError as error:
            return codec.pack({"error": shorten(error, LONGEST_ERROR)})
        except Exception as error:
            reason = f"the policy failed: {type(error).__name__}: {shorten(error, LONGEST_ERROR)}"
            log.error(reason)
            return codec.pack({"error": reason})

    async def _reply(self, request: Mapping[str, Any], client: str) -> Any:
        endpoint = request.get("endpoint", "get_action")
        if endpoint == "ping":
            return {"status": "ok", "message": "Server is running"}
        if endpoint == "reset":
            return {}  # the policy is stateless
        if endpoint == "get_modality_config":
            return _modalities(self._contract)
        if endpoint != "get_action":
            raise BlmError(f"unknown endpoint {shorten(endpoint)}; choose from {', '.join(ENDPOINTS)}")
        data = request.get("data")
        observations = codec.to_observations(data, self._contract)
        results = await self._act(observations, wire.deadline_s(codec.options_of(data)), client)
        actions = np.stack([result.chunk.actions for result in results]).astype(np.float32)
        infer_ms = max(result.infer_ms for result in results)
        info = {"infer_ms": infer_ms, "revision": self._contract.revision}
        places = codec.parts_of(self._contract.action_spaces[observations[0].robot].dimension_kinds)
        return [{part: actions[..., found] for part, found in places.items()}, info]

    async def _act(
        self, observations: Sequence[Observation], within_s: float, client: str
    ) -> Sequence[ActionResult]:
        """Return a result per row.

        If one fails or the client disconnects, the others are cancelled.
        """
        try:
            async with asyncio.TaskGroup() as group:
                rows = [group.create_task(self._scheduler.act(one, within_s, client)) for one in observations]
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [row.result() for row in rows]


def _modalities(contract: PolicyContract) -> dict[str, Any]:
    def config(keys: Sequence[str], steps: int = 1) -> dict[str, Any]:
        described = {"delta_indices": list(range(steps)), "modality_keys": list(keys)}
        return {"__ModalityConfig_class__": True, "as_json": described}

    def parts(kinds: Iterable[Sequence[ActionKind]]) -> list[str]:
        found = {part for one in kinds for part in codec.parts_of(one)}
        return [part for part in codec.PARTS if part in found]

    spaces = contract.action_spaces.values()
    return {
        "video": config(contract.cameras),
        "state": config(parts(space.state_kinds for space in spaces)),
        "action": config(parts(space.dimension_kinds for space in spaces), contract.horizon),
        "language": config(["annotation.human.task_description"]),
    }
