"""A robot's side of the wire: a Policy whose model runs elsewhere. Needs NumPy, msgpack and websockets."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from blm.serving import wire
from blm.types import ActionChunk, BlmError, ContractError, LateError, Observation, PolicyContract

MAX_FRAME = 4 * 2**20
"""Largest frame that is accepted from a server [bytes]: it sends contracts and chunks, no pictures."""


class RemotePolicy:
    """A `Policy` over an OpenPI socket. Nothing is retried: a lost connection raises BlmError."""

    def __init__(
        self,
        uri: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        deadline_ms: float | None = None,
        contract: PolicyContract | None = None,
    ) -> None:
        """`uri` like 'ws://127.0.0.1:8000'. Raises BlmError when nobody answers or the key is refused.

        With `deadline_ms` a chunk that comes later than that after its request reached the server is not
        sent: `act` raises LateError, and the connection stays.

        A server of ours sends its contract. For one that sends none, `contract` says what it needs and gives;
        its pictures then go by OpenPI's own names (observation/image, observation/wrist_image).
        """
        self._uri, self._timeout_s, self._opened = uri, timeout_s, ExitStack()
        self._more = {} if deadline_ms is None else {wire.DEADLINE: deadline_ms}
        options: dict[str, Any] = {"compression": None, "max_size": MAX_FRAME, "open_timeout": timeout_s}
        if api_key is not None:
            options["additional_headers"] = {"Authorization": f"Api-Key {api_key}"}
        try:
            self._socket = self._opened.enter_context(connect(uri, **options))
        except InvalidStatus as error:
            hint = "; pass the server's api_key" if error.response.status_code == 401 else ""
            raise BlmError(f"{uri} refused the connection: {error}{hint}") from error
        except OSError as error:
            raise BlmError(f"no policy server at {uri}: {error}; start one with 'blm serve'") from error
        metadata = self._receive()
        self._foreign = False
        try:
            self._contract = PolicyContract.from_json(metadata)
        except (AttributeError, KeyError, TypeError) as error:
            if contract is None:
                self.close()
                raise ContractError(
                    f"{uri} sends no policy contract when a client connects; say what it needs and gives"
                ) from error
            self._contract, self._foreign = contract, True

    @property
    def contract(self) -> PolicyContract:
        return self._contract

    def act(self, observation: Observation) -> ActionChunk:
        """Ask for the next chunk. An observation that breaks the contract is refused before it is sent."""
        checked = self._contract.check(observation)
        request = wire.pack({**wire.to_request(checked, plain=self._foreign), **self._more})
        try:
            self._socket.send(request)
        except ConnectionClosed as error:
            raise BlmError(f"the connection to {self._uri} is closed: {error}; connect anew") from error
        reply = self._receive()
        if wire.LATE in reply:
            raise LateError(f"{self._uri}: {reply[wire.LATE]}")
        actions = np.asarray(reply["actions"], dtype=np.float32)
        return ActionChunk(actions=actions, rate_hz=self._contract.rate_hz)

    def reset(self) -> None:
        """Nothing: a served policy keeps no memory between requests."""

    def close(self) -> None:
        self._opened.close()

    def _receive(self) -> Any:
        try:
            frame = self._socket.recv(timeout=self._timeout_s)
        except TimeoutError as error:
            self.close()  # a late reply must not be taken for the answer to the next request
            raise BlmError(f"no reply from {self._uri} within {self._timeout_s} s") from error
        except ConnectionClosed as error:
            raise BlmError(f"{self._uri} closed the connection: {error}") from error
        if isinstance(frame, str):
            self.close()
            raise BlmError(f"{self._uri} reports: {frame}")
        return wire.unpack(frame)
