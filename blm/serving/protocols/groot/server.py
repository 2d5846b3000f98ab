"""GR00T's protocol beside ours: requests over ZeroMQ, for clients of Isaac-GR00T's PolicyServer.

A request is msgpack {"endpoint", "data", "api_token"}; the reply to "get_action" is [actions, info], to a
fault {"error": why}; see `groot_codec` for what they hold. "kill", with which any client ends theirs, is
refused.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from fastapi import FastAPI

from blm.serving.access.keys import Access
from blm.serving.protocols.groot import codec
from blm.serving.protocols.groot.zmtp import Peer, Request
from blm.serving.protocols.openpi import wire
from blm.serving.protocols.peers import while_connected
from blm.serving.scheduler import Acted, Engine
from blm.types import BlmError, Observation, Policy, PolicyContract, shorten

log = logging.getLogger(__name__)
ENDPOINTS = ("get_action", "get_modality_config", "ping", "reset")
MAX_CLIENTS = 64
"""Connections. When all are taken, a new one replaces the oldest that has not yet sent a right request."""
PATIENCE_S = 20.0
"""A client has this long for its first right request, and for each message that it has begun."""
LONGEST_ERROR = 1000
"""Characters of an error that a client is told."""
LARGE_AT_ONCE = 4
"""Large messages that are read at a time, each for clients before and after their first right request."""


def add_groot(app: FastAPI, policy: Policy, *, host: str = "127.0.0.1", port: int = 5555) -> None:
    """Let `app` also listen for GR00T clients, from its start to its end; they share its engine and keys.

    Raises BlmError at the start if the address is taken.
    """
    rest = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with rest(app) as state:
            groot = GrootServer(app.state.engine, policy.contract, app.state.access)
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
    """Answers clients; of each one request is in work at a time, with all its rows."""

    def __init__(self, engine: Engine, contract: PolicyContract, access: Access) -> None:
        self._engine, self._contract = engine, contract
        self._accepts = access.accepts if access.needs_key else None
        self._limit = codec.message_limit(contract)
        self._unproven, self._proven = dict[asyncio.Task[None], None](), set[asyncio.Task[None]]()
        """Connections before and after their first right request; the former in the order of their coming."""
        self._slots = asyncio.Semaphore(LARGE_AT_ONCE), asyncio.Semaphore(LARGE_AT_ONCE)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk with one client until it leaves."""
        task, peer = asyncio.current_task(), Peer(reader, writer)
        assert task is not None
        if not self._make_place():
            peer.close()
            return
        self._unproven[task] = None
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        address = writer.get_extra_info("peername")
        try:
            await self._converse(peer, f"groot {address}", task)
        except (EOFError, OSError, TimeoutError, BlmError) as error:
            log.info("the GR00T client at %s is gone: %s %s", address, type(error).__name__, shorten(error))
        except asyncio.CancelledError:
            log.info("the GR00T client at %s is cut off", address)
        finally:
            self._unproven.pop(task, None)
            self._proven.discard(task)
            peer.close()

    async def close(self) -> None:
        """Cut off all clients."""
        tasks = [*self._unproven, *self._proven]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _make_place(self) -> bool:
        if len(self._unproven) + len(self._proven) < MAX_CLIENTS:
            return True
        if not self._unproven:
            return False
        oldest = next(iter(self._unproven))
        del self._unproven[oldest]
        oldest.cancel()
        return True

    async def _converse(self, peer: Peer, client: str, task: asyncio.Task[None]) -> None:
        opened: Mapping[str, Any] | None = None
        async with asyncio.timeout(PATIENCE_S):
            await peer.shake_hands()
            while opened is None:
                request = await peer.receive(self._limit, PATIENCE_S, self._slots[0])
                opened = await self._open(peer, request)
        self._unproven.pop(task, None)
        self._proven.add(task)
        receiving = self._start_receiving(peer)
        try:
            while True:
                if opened is not None:
                    reply = await while_connected(self._answer(opened, client), receiving)
                    await peer.send(request, reply)
                request = await receiving
                receiving = self._start_receiving(peer)
                opened = await self._open(peer, request)
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)

    def _start_receiving(self, peer: Peer) -> asyncio.Task[Request]:
        return asyncio.create_task(peer.receive(self._limit, PATIENCE_S, self._slots[1]))

    async def _open(self, peer: Peer, request: Request) -> Mapping[str, Any] | None:
        """Decode a request; None when it cannot be answered, and the client has been told why."""
        try:
            return codec.read_request(request.body, self._accepts)
        except BlmError as error:
            await peer.send(request, codec.pack({"error": shorten(error, LONGEST_ERROR)}))
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
            return {}  # the policy keeps nothing between requests
        if endpoint == "get_modality_config":
            return _modalities(self._contract)
        if endpoint != "get_action":
            raise BlmError(f"unknown endpoint {shorten(endpoint)}; choose from {', '.join(ENDPOINTS)}")
        data = request.get("data")
        observations = codec.to_observations(data, self._contract)
        acted = await self._act(observations, wire.deadline_s(codec.options_of(data)), client)
        actions = np.stack([one.chunk.actions for one in acted]).astype(np.float32)
        info = {"infer_ms": max(one.infer_ms for one in acted), "revision": self._contract.revision}
        return [{"arm": actions[..., :-1], "gripper": actions[..., -1:]}, info]

    async def _act(
        self, observations: Sequence[Observation], within_s: float, client: str
    ) -> Sequence[Acted]:
        """A chunk for each row. When one fails, or the client has gone, the others leave the engine."""
        try:
            async with asyncio.TaskGroup() as group:
                rows = [group.create_task(self._engine.act(one, within_s, client)) for one in observations]
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [row.result() for row in rows]


def _modalities(contract: PolicyContract) -> dict[str, Any]:
    def config(keys: Sequence[str], steps: int = 1) -> dict[str, Any]:
        described = {"delta_indices": list(range(steps)), "modality_keys": list(keys)}
        return {"__ModalityConfig_class__": True, "as_json": described}

    return {
        "video": config(contract.cameras),
        "state": config(codec.PARTS),
        "action": config(codec.PARTS, contract.horizon),
        "language": config(["annotation.human.task_description"]),
    }
