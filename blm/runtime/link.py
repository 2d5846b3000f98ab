"""The link to the policy: asks in a thread of its own, and connects again after a loss."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from blm.runtime.chunks import Reply, Request
from blm.runtime.states import Event, Found, Late, Lost, Malformed
from blm.serving.client import RemotePolicy
from blm.types import ContractError, LateError, Policy

RETRY_S = 0.2


def ask(policy: Policy, request: Request) -> Reply:
    """Ask a policy. A served one gets the request's number and time; its client checks what returns."""
    if isinstance(policy, RemotePolicy):
        chunk = policy.act(request.observation, request_id=request.number, observed_s=request.observed_at)
    else:
        chunk = policy.act(request.observation)
    if abs(chunk.rate_hz - policy.contract.rate_hz) > 1e-6:
        raise ContractError(f"a chunk of {chunk.rate_hz} Hz; the contract says {policy.contract.rate_hz} Hz")
    return Reply(number=request.number, observed_at=request.observed_at, actions=chunk.actions)


class PolicyLink:
    """Carries requests to the policy and events back. No method blocks but `close`, for a bounded time."""

    def __init__(self, policy: Policy, make_policy: Callable[[], Policy]) -> None:
        """`policy` is connected; `make_policy` connects anew, and may raise or block."""
        self._policy: Policy | None = policy
        self._make = make_policy
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._busy, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="blm-policy", daemon=True)
        self._thread.start()

    @property
    def can_ask(self) -> bool:
        """Whether a request would be sent at once. Read it before `poll`: what made it true is then seen."""
        return not self._busy.is_set()

    def ask(self, request: Request) -> None:
        self._busy.set()
        self._requests.put(request)

    def poll(self) -> list[Event]:
        """Return what happened since the last call."""
        events: list[Event] = []
        while not self._events.empty():
            events.append(self._events.get())
        return events

    def close(self, timeout_s: float) -> bool:
        """Close the connection and end the thread; whether it ended within this time."""
        self._closing.set()
        self._requests.put(None)
        self._thread.join(timeout_s / 2)
        if self._thread.is_alive():  # it waits for a reply: closing its connection wakes it
            close_policy(self._policy)
            self._thread.join(timeout_s / 2)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while (request := self._requests.get()) is not None and not self._closing.is_set():
                self._serve(request)
        finally:
            close_policy(self._policy)

    def _serve(self, request: Request) -> None:
        assert self._policy is not None
        try:
            event: Event = ask(self._policy, request)
        except LateError:
            event = Late(request.number)
        except ContractError as error:
            event = Malformed(str(error)[:300])
        except Exception as error:  # whatever a policy raises: it is given up and made anew
            self._events.put(Lost(f"{type(error).__name__}: {str(error)[:300]}"))
            close_policy(self._policy)
            self._policy = None
            if (policy := self._reconnect()) is None:
                return
            self._policy, event = policy, Found(policy.contract)
        self._events.put(event)
        self._busy.clear()

    def _reconnect(self) -> Policy | None:
        """Try until there is a policy; None when the link is closed, as the loop does at its end."""
        while not self._closing.wait(RETRY_S):
            try:
                return self._make()
            except Exception:
                continue
        return None


def close_policy(policy: Any) -> None:
    """Close what can be closed; a failure to do so harms nobody any more."""
    try:
        if hasattr(policy, "close"):
            policy.close()
    except Exception:
        return
