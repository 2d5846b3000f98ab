"""The client of a policy server: a `Policy` over OpenPI.

It needs NumPy, msgpack and websockets only.
"""

from __future__ import annotations

import json
import math
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Self

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.sync.client import connect

from blm.addresses import is_loopback_url
from blm.serving.protocols.openpi import wire
from blm.types import (
    ActionChunk,
    BlmError,
    ContractError,
    FloatArray,
    LateError,
    Observation,
    PolicyContract,
    shorten,
)

MAX_FRAME = 4 * 2**20
"""Maximum size of a frame from a server [bytes]: contracts and action chunks, no images."""
CLOSE_TIMEOUT_S = 1.0
"""Timeout of the server's reply to a close frame [s]."""
MAX_MESSAGE = 300
"""Maximum length of a server's message that an error repeats [characters]."""


class RemotePolicy:
    """A `Policy` over an OpenPI websocket, and a context manager that closes it.

    It does not retry, and every fault of a server raises BlmError. Connections to loopback use no
    proxy; other hosts are reached through the proxies of the environment.

    A reply is accepted only if it belongs to the last request. Servers of this package echo the
    number and time of the request, which must match. For a server that echoes neither, the order on
    the socket decides: there is one request at a time, and a timeout or an unrequested frame closes
    the connection.
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
        """Connect to `uri`, such as 'ws://127.0.0.1:8000'. Raises BlmError if the connection fails.

        `timeout_s`: for the connection and for each reply [s]. `deadline_ms`: the server discards a
        chunk that is not ready within this time after the request arrived; `act` then raises
        LateError, and the connection stays open.

        Servers of this package send their contract on connection. For other servers, pass the
        `contract`; images are then sent under OpenPI's names (observation/image,
        observation/wrist_image).
        """
        self._uri, self._timeout_s, self._opened, self._numbers = uri, timeout_s, ExitStack(), 0
        self._options = {} if deadline_ms is None else {wire.DEADLINE: deadline_ms}
        options: dict[str, Any] = {"compression": None, "max_size": MAX_FRAME, "open_timeout": timeout_s}
        options["close_timeout"] = min(timeout_s, CLOSE_TIMEOUT_S)
        if api_key is not None:
            options["additional_headers"] = {"Authorization": f"Api-Key {api_key}"}
        self._socket = self._opened.enter_context(_connect(uri, options))
        seconds = struct.pack("@ll", math.ceil(timeout_s), 0)
        with suppress(OSError):  # Windows expects another format
            self._socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        try:
            self._contract, self._foreign = self._read_contract(contract)
        except BaseException:
            self.close()
            raise

    def _read_contract(self, stated: PolicyContract | None) -> tuple[PolicyContract, bool]:
        """Return the server's contract and False, or the user's contract and True."""
        metadata = self._receive()
        try:
            return PolicyContract.from_json(metadata), False
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if stated is None or not isinstance(metadata, Mapping):
                raise ContractError(
                    f"{self._uri} sends no policy contract on connection; pass RemotePolicy(contract=...)"
                ) from error
            return stated, True

    @property
    def contract(self) -> PolicyContract:
        return self._contract

    def act(
        self, observation: Observation, *, request_id: int | None = None, observed_s: float | None = None
    ) -> ActionChunk:
        """Request the next action chunk, after checking the observation.

        `request_id` defaults to a count, and `observed_s`, the time of the observation on the
        caller's monotonic clock [s], to now. Raises LateError if the server missed the deadline,
        ContractError for a reply that is not a valid chunk for this robot, and BlmError if the
        connection is lost or a reply belongs to another request.
        """
        checked = self._contract.check(observation)
        self._numbers += 1
        echoed = {
            wire.REQUEST_ID: self._numbers if request_id is None else request_id,
            wire.OBSERVED: time.monotonic() if observed_s is None else observed_s,
        }
        message = wire.to_request(checked, plain=self._foreign)
        request = wire.pack({**message, **self._options, **echoed})
        self._require_no_frame()
        try:
            self._socket.send(request)
        except ConnectionClosed as error:
            raise BlmError(f"the connection to {self._uri} is closed: {error}; reconnect") from error
        reply = self._receive()
        if not isinstance(reply, Mapping):
            raise ContractError(f"{self._uri} sent a {type(reply).__name__} as its reply; needed: a map")
        for key, value in echoed.items():
            if reply.get(key, value) != value:
                self.close()
                raise BlmError(
                    f"{self._uri} sent a reply with {key} {_short(reply[key])}; the request had {value}"
                )
        if wire.LATE in reply:
            raise LateError(f"{self._uri}: {_short(reply[wire.LATE])}")
        dim = self._contract.action_spaces[checked.robot].dim
        actions = read_actions(reply, self._contract.horizon, dim, self._uri)
        return ActionChunk(actions=actions, rate_hz=self._contract.rate_hz)

    def reset(self) -> None:
        """Do nothing: a served policy is stateless."""

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_no_frame(self) -> None:
        """Raise BlmError, and close, if a frame has already arrived: no reply is due."""
        try:
            frame = self._socket.recv(timeout=0)
        except TimeoutError:
            return
        except ConnectionClosed as error:
            raise BlmError(f"the connection to {self._uri} is closed: {error}; reconnect") from error
        self.close()
        content = f": {_short(frame)}" if isinstance(frame, str) else ""
        raise BlmError(f"{self._uri} sent a frame without a request{content}; reconnect")

    def _receive(self) -> Any:
        try:
            frame = self._socket.recv(timeout=self._timeout_s)
        except TimeoutError as error:
            self.close()  # a late reply must not be taken for the reply to the next request
            raise BlmError(f"no reply from {self._uri} within {self._timeout_s} s") from error
        except ConnectionClosed as error:
            self.close()
            raise BlmError(f"{self._uri} closed the connection: {_short(error)}") from error
        if isinstance(frame, str):
            self.close()
            raise BlmError(f"{self._uri} reports: {_short(frame)}")
        try:
            return wire.unpack(frame)
        except BlmError as error:
            self.close()  # its later frames cannot be matched with requests
            raise BlmError(f"{self._uri} sent a frame that cannot be read: {_short(error)}") from error


def _connect(uri: str, options: Mapping[str, Any]) -> Any:
    try:
        return connect(uri, proxy=None if is_loopback_url(uri) else True, **options)
    except InvalidStatus as error:
        hint = "; pass the server's api_key" if error.response.status_code == 401 else ""
        reason = _reason(error.response.body) or str(error)
        status = error.response.status_code
        raise BlmError(f"{uri} refused the connection with status {status}: {reason}{hint}") from error
    except (InvalidURI, ValueError) as error:
        raise BlmError(f"'{uri[:100]}' is not of the form ws://HOST:PORT: {_short(error)}") from error
    except ImportError as error:  # SOCKS proxies need another package
        raise BlmError(f"cannot use the proxy set in the environment for {uri}: {error}") from error
    except (WebSocketException, EOFError) as error:
        raise BlmError(f"the server at {uri} is not a policy server: {_short(error)}") from error
    except OSError as error:
        raise BlmError(f"no policy server at {uri}: {error}; start one with 'blm serve'") from error


def _reason(body: bytes | bytearray | None) -> str:
    """Return the message of an error in OpenAI's format; empty if there is none."""
    try:
        return _short(json.loads(body or b"")["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def read_actions(reply: Mapping[Any, Any], horizon: int, dim: int, where: str) -> FloatArray:
    """Return the chunk of a reply as float32 [H, dim], 1 <= H <= horizon.

    Raises ContractError. `where` names the server in error messages.
    """
    needed = f"needed: 'actions', finite numbers of shape (1..{horizon}, {dim})"
    if "actions" not in reply:
        keys = _short(str(sorted(map(str, reply))))
        raise ContractError(f"the reply of {where} has {keys}; {needed}")
    try:
        array = np.asarray(reply["actions"])
    except (TypeError, ValueError) as error:
        raise ContractError(f"the actions of {where} are not an array: {_short(error)}; {needed}") from error
    if array.dtype.kind not in "fiu" or array.ndim != 2 or array.shape[1] != dim:
        raise ContractError(f"the actions of {where} are {array.dtype} {_short(array.shape)}; {needed}")
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, and are refused
        actions = array.astype(np.float32)
    if not 1 <= len(actions) <= horizon or not np.isfinite(actions).all():
        fault = f"{len(actions)} steps" if np.isfinite(actions).all() else "not finite"
        raise ContractError(f"the actions of {where} are {fault}; {needed}")
    return actions


def _short(value: object) -> str:
    return shorten(value, MAX_MESSAGE, quote=False)
