"""A robot's side of the wire: a Policy whose model runs elsewhere. Needs NumPy, msgpack and websockets."""

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
)

MAX_FRAME = 4 * 2**20
"""Largest frame that is accepted from a server [bytes]: it sends contracts and chunks, no pictures."""
CLOSE_TIMEOUT_S = 1.0
"""A server that does not answer a close is left after this time [s]."""
MAX_MESSAGE = 300
"""Characters of a server's own words that an error repeats."""


class RemotePolicy:
    """A `Policy` over an OpenPI socket, and a context manager that closes it.

    Nothing is retried, and whatever a server does raises BlmError and nothing else. To loopback it uses no
    proxy; for other hosts the proxies of the environment apply.

    A reply is believed only if it is the answer to the request before it. Servers of ours return the
    request's number and time, which must be equal. With a server that returns neither, the order on the
    socket tells: one request at a time, and after a timeout, or a frame that nobody asked for, the connection
    is closed.
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
        self._uri, self._timeout_s, self._opened, self._numbers = uri, timeout_s, ExitStack(), 0
        self._more = {} if deadline_ms is None else {wire.DEADLINE: deadline_ms}
        options: dict[str, Any] = {"compression": None, "max_size": MAX_FRAME, "open_timeout": timeout_s}
        options["close_timeout"] = min(timeout_s, CLOSE_TIMEOUT_S)
        if api_key is not None:
            options["additional_headers"] = {"Authorization": f"Api-Key {api_key}"}
        self._socket = self._opened.enter_context(_connect(uri, options))
        seconds = struct.pack("@ll", math.ceil(timeout_s), 0)
        with suppress(OSError):  # Windows has another form of it
            self._socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        try:
            self._contract, self._foreign = self._read_contract(contract)
        except BaseException:
            self.close()
            raise

    def _read_contract(self, stated: PolicyContract | None) -> tuple[PolicyContract, bool]:
        """Return the server's contract and False, or the one that the user stated and True."""
        metadata = self._receive()
        try:
            return PolicyContract.from_json(metadata), False
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if stated is None or not isinstance(metadata, Mapping):
                raise ContractError(
                    f"{self._uri} sends no policy contract when one connects; say what it needs and gives"
                ) from error
            return stated, True

    @property
    def contract(self) -> PolicyContract:
        return self._contract

    def act(
        self, observation: Observation, *, request_id: int | None = None, observed_s: float | None = None
    ) -> ActionChunk:
        """Ask for the next chunk. An observation that breaks the contract is refused before it is sent.

        `request_id` and `observed_s`, the time of the observation on the caller's monotonic clock, default to
        a count and to now. Raises LateError when the server gave the request up, ContractError for a reply
        that is no chunk for this robot, and BlmError when the connection is lost or holds another's reply.
        """
        checked = self._contract.check(observation)
        self._numbers += 1
        mine = {
            wire.REQUEST_ID: self._numbers if request_id is None else request_id,
            wire.OBSERVED: time.monotonic() if observed_s is None else observed_s,
        }
        request = wire.pack({**wire.to_request(checked, plain=self._foreign), **self._more, **mine})
        self._require_silence()
        try:
            self._socket.send(request)
        except ConnectionClosed as error:
            raise BlmError(f"the connection to {self._uri} is closed: {error}; connect anew") from error
        reply = self._receive()
        if not isinstance(reply, Mapping):
            raise ContractError(f"{self._uri} sent a {type(reply).__name__} as its reply; needed: a map")
        for key, value in mine.items():
            if reply.get(key, value) != value:
                self.close()
                raise BlmError(
                    f"{self._uri} sent a reply with {key} {_shortened(reply[key])}, asked was {value}"
                )
        if wire.LATE in reply:
            raise LateError(f"{self._uri}: {_shortened(reply[wire.LATE])}")
        dim = self._contract.action_spaces[checked.robot].dim
        actions = read_actions(reply, self._contract.horizon, dim, self._uri)
        return ActionChunk(actions=actions, rate_hz=self._contract.rate_hz)

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

    def _require_silence(self) -> None:
        """Raise BlmError, and close, if a frame is there already: it cannot be the answer to what comes."""
        try:
            frame = self._socket.recv(timeout=0)
        except TimeoutError:
            return
        except ConnectionClosed as error:
            raise BlmError(f"the connection to {self._uri} is closed: {error}; connect anew") from error
        self.close()
        what = f": {_shortened(frame)}" if isinstance(frame, str) else ""
        raise BlmError(f"{self._uri} sent a frame that nobody asked for{what}; connect anew")

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


def read_actions(reply: Mapping[Any, Any], horizon: int, dim: int, where: str) -> FloatArray:
    """Return a reply's chunk as float32 [H, dim], 1 <= H <= horizon. Raises ContractError for any other."""
    needed = f"needed: 'actions', finite numbers of shape (1..{horizon}, {dim})"
    if "actions" not in reply:
        raise ContractError(f"the reply of {where} has {_shortened(sorted(map(str, reply)))}; {needed}")
    try:
        array = np.asarray(reply["actions"])
    except (TypeError, ValueError) as error:
        raise ContractError(f"the actions of {where} are no array: {_shortened(error)}; {needed}") from error
    if array.dtype.kind not in "fiu" or array.ndim != 2 or array.shape[1] != dim:
        raise ContractError(f"the actions of {where} are {array.dtype} {_shortened(array.shape)}; {needed}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
        actions = array.astype(np.float32)
    if not 1 <= len(actions) <= horizon or not np.isfinite(actions).all():
        what = f"{len(actions)} steps" if np.isfinite(actions).all() else "not finite"
        raise ContractError(f"the actions of {where} are {what}; {needed}")
    return actions


def _shortened(value: object) -> str:
    text = " ".join(str(value)[: 4 * MAX_MESSAGE].split())
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"
