"""The link to the policy: sends requests from a separate thread, and reconnects after a loss."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from blm.runtime.states import PolicyEvent, PolicyLost, PolicyReconnected, ReplyLate, ReplyMalformed
from blm.runtime.timeline import ChunkReply, ChunkRequest
from blm.serving.client import RemotePolicy
from blm.types import ContractError, LateError, Policy

RETRY_S = 0.2
"""Time between two attempts to reconnect [s]."""
"""Time between two attempts to reconnect [s]."""


def ask(policy: Policy, request: ChunkRequest) -> ChunkReply:
    """Call the policy.

    A served policy receives the request's number and time, and its client checks that the reply
    echoes them. Raises the policy's exceptions, and ContractError for a wrong rate.
    """
    if isinstance(policy, RemotePolicy):
        chunk = policy.act(request.observation, request_id=request.number, observed_s=request.observed_at)
    else:
        chunk = policy.act(request.observation)
    if abs(chunk.rate_hz - policy.contract.rate_hz) > 1e-6:
        raise ContractError(f"a chunk of {chunk.rate_hz} Hz; the contract says {policy.contract.rate_hz} Hz")
    return ChunkReply(number=request.number, observed_at=request.observed_at, actions=chunk.actions)


class PolicyLink:
    """Passes requests to the policy and events back. Only `close` blocks, for a bounded time."""

    def __init__(self, policy: Policy, make_policy: Callable[[], Policy]) -> None:
        """`policy` is connected; `make_policy` reconnects, and may raise or block."""
        self._policy: Policy | None = policy
        self._make = make_policy
        self._requests: queue.SimpleQueue[ChunkRequest | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[PolicyEvent] = queue.SimpleQueue()
        self._busy, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="blm-policy", daemon=True)
        self._thread.start()

    @property
    def can_ask(self) -> bool:
        """Whether a request would be sent at once. Read it before `poll`, so that the event that
        caused it is among those that `poll` returns."""
        return not self._busy.is_set()

    def ask(self, request: ChunkRequest) -> None:
        self._busy.set()
        self._requests.put(request)

    def poll(self) -> list[PolicyEvent]:
        """Return the events since the last call."""
        events: list[PolicyEvent] = []
        while not self._events.empty():
            events.append(self._events.get())
        return events

    def close(self, timeout_s: float) -> bool:
        """Close the connection and end the thread. Returns whether it ended within `timeout_s`."""
        self._closing.set()
        self._requests.put(None)
        self._thread.join(timeout_s / 2)
        if self._thread.is_alive():  # it waits for a reply; closing the connection ends that wait
            close_policy(self._policy)
            self._thread.join(timeout_s / 2)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while (request := self._requests.get()) is not None and not self._closing.is_set():
                self._serve(request)
        finally:
            close_policy(self._policy)

    def _serve(self, request: ChunkRequest) -> None:
        assert self._policy is not None
        try:
            event: PolicyEvent = ask(self._policy, request)
        except LateError:
            event = ReplyLate(request.number)
        except ContractError as error:
            event = ReplyMalformed(str(error)[:300])
        except Exception as error:  # any other failure of the policy: close it and reconnect
            self._events.put(PolicyLost(f"{type(error).__name__}: {str(error)[:300]}"))
            close_policy(self._policy)
            self._policy = None
            if (policy := self._reconnect()) is None:
                return
            self._policy, event = policy, PolicyReconnected(policy.contract)
        self._events.put(event)
        self._busy.clear()

    def _reconnect(self) -> Policy | None:
        """Retry until a connection succeeds; return None when the link is closed."""
        while not self._closing.wait(RETRY_S):
            try:
                return self._make()
            except Exception:
                continue
        return None


def close_policy(policy: Any) -> None:
    """Close a policy if it can be closed; errors are ignored, because it is not used any more."""
    try:
        if hasattr(policy, "close"):
            policy.close()
    except Exception:
        return
