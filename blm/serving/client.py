"""A robot's side of the wire: a Policy whose model runs elsewhere. Needs NumPy, msgpack and websockets."""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Self

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.sync.client import connect

from blm.addresses import is_loopback_url
from blm.serving import wire
from blm.types import (
    ActionChunk,
    BlmError,
    ContractError,
    FloatArray,
    LateError,
    Observation,
    PolicyContract,
)

MAX_FRAME = 64 * 2**20
"""Largest frame that is accepted [bytes]."""
CLOSE_TIMEOUT_S = 1.0
"""A server that does not answer a close is left after this time [s]."""
MAX_STEPS = 1024
"""Longest chunk that is accepted [steps]; servers send 4 to 64."""
MAX_MESSAGE = 300
"""Characters of a server's own words that an error repeats."""


class RemotePolicy:
    """A `Policy` over an OpenPI socket, and a context manager that closes it.

    Nothing is retried, and whatever a server does raises BlmError and nothing else. To loopback it uses no
    proxy; for other hosts the proxies of the environment apply.
    """

    def __init__(
        self,
        uri: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        deadline_ms: float | None = None,
        contract: PolicyContract | None = None,
    ) -> None:
        """`uri` like 'ws://127.0.0.1:8000'. Raises BlmError when nobody answers or the server refuses.

        With `deadline_ms` a chunk that comes later than that after its request reached the server is not
        sent: `act` raises LateError, and the connection stays.

        A server of ours sends its contract. For one that sends none, `contract` says what it needs and gives;
        its pictures then go by OpenPI's own names (observation/image, observation/wrist_image).
        """
        self._uri, self._timeout_s, self._opened = uri, timeout_s, ExitStack()
        self._more = {} if deadline_ms is None else {wire.DEADLINE: deadline_ms}
        options: dict[str, Any] = {"compression": None, "max_size": MAX_FRAME, "open_timeout": timeout_s}
        options["close_timeout"] = min(timeout_s, CLOSE_TIMEOUT_S)
        if api_key is not None:
            options["additional_headers"] = {"Authorization": f"Api-Key {api_key}"}
        self._socket = self._opened.enter_context(_connect(uri, options))
        seconds = struct.pack("@ll", math.ceil(timeout_s), 0)
        with suppress(OSError):  # Windows has another form of it
            self._socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        metadata = self._receive()
        self._foreign = False
        try:
            self._contract = PolicyContract.from_json(metadata)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if contract is None or not isinstance(metadata, Mapping):
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
        if isinstance(reply, Mapping) and wire.LATE in reply:
            raise LateError(f"{self._uri}: {_shortened(reply[wire.LATE])}")
        dim = self._contract.action_spaces[checked.robot].dim
        return ActionChunk(actions=_read_actions(reply, dim, self._uri), rate_hz=self._contract.rate_hz)

    def reset(self) -> None:
        """Nothing: a served policy keeps no memory between requests."""

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self) -> Any:
        try:
            frame = self._socket.recv(timeout=self._timeout_s)
        except TimeoutError as error:
            self.close()  # a late reply must not be taken for the answer to the next request
            raise BlmError(f"no reply from {self._uri} within {self._timeout_s} s") from error
        except ConnectionClosed as error:
            self.close()
            raise BlmError(f"{self._uri} closed the connection: {_shortened(error)}") from error
        if isinstance(frame, str):
            self.close()
            raise BlmError(f"{self._uri} reports: {_shortened(frame)}")
        try:
            return wire.unpack(frame)
        except BlmError as error:
            self.close()  # whatever it sends next answers no request of ours
            raise BlmError(f"{self._uri} sent a frame that cannot be read: {_shortened(error)}") from error


def _connect(uri: str, options: Mapping[str, Any]) -> Any:
    try:
        return connect(uri, proxy=None if is_loopback_url(uri) else True, **options)
    except InvalidStatus as error:
        hint = "; pass the server's api_key" if error.response.status_code == 401 else ""
        reason = _reason(error.response.body) or str(error)
        status = error.response.status_code
        raise BlmError(f"{uri} refused the connection with status {status}: {reason}{hint}") from error
    except (InvalidURI, ValueError) as error:
        raise BlmError(f"'{uri[:100]}' is not of the form ws://HOST:PORT: {_shortened(error)}") from error
    except ImportError as error:  # of a SOCKS proxy
        raise BlmError(f"cannot use the proxy that the environment names for {uri}: {error}") from error
    except (WebSocketException, EOFError) as error:
        raise BlmError(f"what answers at {uri} is no policy server: {_shortened(error)}") from error
    except OSError as error:
        raise BlmError(f"no policy server at {uri}: {error}; start one with 'blm serve'") from error


def _reason(body: bytes | bytearray | None) -> str:
    """Return the message of an error in OpenAI's form, or nothing."""
    try:
        return _shortened(json.loads(body or b"")["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _read_actions(reply: Any, dim: int, uri: str) -> FloatArray:
    """Return the chunk of a reply [H, dim]. Raises BlmError for anything else, and for values not finite."""
    if not isinstance(reply, Mapping) or "actions" not in reply:
        raise BlmError(f"{uri} sent a reply without 'actions'")
    try:
        actions = np.asarray(reply["actions"], dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise BlmError(f"{uri} sent actions that are no array of numbers: {_shortened(error)}") from error
    if actions.ndim != 2 or actions.shape[1] != dim or not 1 <= len(actions) <= MAX_STEPS:
        needed = f"[1 .. {MAX_STEPS}, {dim}]"
        raise BlmError(f"{uri} sent actions of shape {list(actions.shape)[:8]}; needed: {needed}")
    if not np.isfinite(actions).all():
        raise BlmError(f"{uri} sent actions that are not finite")
    return actions


def _shortened(value: object) -> str:
    text = " ".join(str(value)[: 4 * MAX_MESSAGE].split())
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"
