"""The scheduler: one thread runs the model for all clients, batches of actions first, chat in
between.

An action request never waits for a whole prompt or answer. Between two batches of actions the model
runs one bounded step of chat: it encodes a few pictures, prefills one piece of a prompt, or
generates one token of the running sequences. Tokenizing and image preprocessing run in another
thread.

Why there are two batching queues: this one serves several clients in turn over asyncio, with
deadlines and with chat between the batches; `blm.evaluation.physical.policy_host` answers the
worker processes of one evaluation over pipes, where every observation must be answered and nothing
may be late or refused.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import Future

from blm.serving.admission import ChatAdmission
from blm.serving.health import Health, HealthMonitor
from blm.serving.requests import (
    ActionRequest,
    ActionResult,
    BatchPolicy,
    BusyError,
    ChatRequest,
    FairQueue,
    ModelError,
    SchedulerLimits,
    TokenGenerator,
    as_exception,
    blank_observation,
)
from blm.serving.runners import ActionRunner, ChatRunner
from blm.types import BlmError, ChatCapacity, Message, Observation, Policy, Sampling

__all__ = [
    "ActionResult",
    "BatchPolicy",
    "BusyError",
    "Health",
    "ModelError",
    "ModelScheduler",
    "SchedulerLimits",
    "TokenGenerator",
    "blank_observation",
]
log = logging.getLogger(__name__)
YIELD_S = 2e-4
"""Pause after each iteration [s]. A thread that waits for the interpreter lock (GIL) is woken
whenever torch releases it, and seldom gets it in time: without a pause the event loop stood still
for 4 s, on two busy cores, until a prompt was prefilled."""
SWITCH_S = 5e-4
"""How long another thread may hold the GIL when the model thread needs it [s]
(`sys.setswitchinterval`). One decision acquires the GIL about 700 times; with Python's default of 5
ms, a thread that parses JSON makes it take 3.5 s."""


class ModelScheduler:
    """The model thread, and the request queues in front of it."""

    def __init__(
        self, policy: Policy | None, generator: TokenGenerator | None, limits: SchedulerLimits | None = None
    ) -> None:
        """Raises BlmError for a policy that sees several observations."""
        if policy is not None and policy.contract.frames > 1:
            raise BlmError(
                f"this policy sees {policy.contract.frames} observations, and the protocols of robots carry "
                "one; run it in simulation with `blm eval physical`"
            )
        self.policy, self.generator = policy, generator
        self.limits = limits = limits or SchedulerLimits()
        self._action_runner = ActionRunner(policy) if policy is not None else None
        self._chat_runner = ChatRunner(generator, limits) if generator is not None else None
        self._changed = threading.Condition()
        """The lock of all queues; notified when there is work or the server closes."""
        self._actions = FairQueue[ActionRequest](
            "action", limits.max_queued_actions, limits.max_queued_actions_per_client
        )
        self._chats = ChatAdmission(self._chat_runner, limits, self._changed, self._wake)
        self._cancelled = list[ChatRequest]()
        runners = (self._action_runner, self._chat_runner)
        self._monitor = HealthMonitor([runner for runner in runners if runner is not None], limits)
        self.ready = self._monitor.ready
        """Set after the first health check."""
        self._closing = False
        self._close_at = float("inf")
        """When unfinished requests receive an error [s, monotonic]."""
        self._ended: Exception | None = None
        """The error for every new request once the model thread has ended."""
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
        self._thread = threading.Thread(target=self._run, name="blm-model", daemon=True)
        self._thread.start()
        threading.Thread(target=self._chats.run_tokenizer, name="blm-tokenizer", daemon=True).start()

    # --- called by the routes ---

    async def act(
        self, observation: Observation, within_s: float = float("inf"), client: Hashable | None = None
    ) -> ActionResult:
        """Return the next action chunk. Clients, told apart by `client`, are served round-robin.

        Raises BusyError if the queue is full, LateError after `within_s` seconds, ModelError for an
        invalid chunk, and whatever the policy raises.
        """
        request = ActionRequest(observation, time.monotonic() + within_s, Future())
        with self._changed:
            self._require_open(self._action_runner, "policy")
            self._actions.put(request, client)
            self._wake()
        try:
            return await asyncio.wrap_future(request.done)
        finally:
            request.done.cancel()
            with self._changed:
                self._actions.remove(request, client)  # frees its place at once if the caller was cancelled

    def chat(
        self, messages: Sequence[Message], samplings: Sequence[Sampling], client: Hashable | None = None
    ) -> ChatRequest:
        """Start to generate one sequence per sampling; call `cancel` at the end. Raises
        BusyError."""
        request = ChatRequest(messages, samplings, asyncio.get_running_loop(), client)
        with self._changed:
            self._require_open(self._chat_runner, "chat")
            self._chats.queue.put(request, client)
            self._wake()
        return request

    def cancel(self, request: ChatRequest) -> None:
        """Stop a chat request after the current step; does nothing if it has finished."""
        with self._changed:
            request.cancelled = True
            if not self._chats.queue.remove(request, request.client):
                self._cancelled.append(request)
            self._wake()

    @property
    def capacity(self) -> ChatCapacity | None:
        """The size limits of one chat request; None without chat, or if the generator states
        none."""
        return getattr(self.generator, "capacity", None)

    @property
    def waiting(self) -> dict[str, int]:
        """Number of requests that are queued or in progress, by kind."""
        chat = self._chat_runner
        return {
            "actions": len(self._actions),
            "chats": len(self._chats),
            "answers": len(chat.decoding) + len(chat.before_first_token()) if chat else 0,
        }

    @property
    def failed(self) -> Exception | None:
        """Why the model does not work, or None."""
        health = self.health()
        return ModelError(health.reason) if health.status == "failed" else None

    def health(self) -> Health:
        """Return whether the model can answer now. Never blocks; may be called from any thread."""
        if not self._thread.is_alive() and not self._closing:
            return Health("failed", f"the model thread has ended: {self._ended!r}")
        if self._closing:
            return Health("closing", "the server is shutting down")
        return self._monitor.health(self._chats.tokenizing_since)

    def close(self, grace_s: float = 0.0) -> None:
        """Refuse new requests. After `grace_s` seconds, unfinished requests receive a BusyError."""
        with self._changed:
            self._closing = True
            self._close_at = min(self._close_at, time.monotonic() + grace_s)
            self._changed.notify()

    def join(self) -> None:
        """Wait until the model thread has ended, after `close`."""
        self._thread.join()

    def _require_open(self, runner: ActionRunner | ChatRunner | None, space: str) -> None:
        if runner is None:
            raise BlmError(f"this server has no {space}")
        if self._closing:
            raise BusyError("the server is shutting down")
        if self._ended is not None:
            raise self._ended

    def _wake(self) -> None:
        if self._monitor.idle:
            self._monitor.note_progress()
            self._monitor.idle = False
        self._changed.notify()

    # --- the model thread ---

    def _run(self) -> None:
        error: Exception | None = None
        try:
            self._monitor.first_check()
            while self._iterate():
                self._monitor.note_progress()
        except BaseException as problem:  # a bug in this module: waiting clients must receive an error
            log.critical("the model thread has ended", exc_info=problem)
            error = ModelError(f"the model thread has ended: {as_exception(problem)!r}")
        finally:
            self._fail_all(error or BusyError("the server is shutting down"))

    def _iterate(self) -> bool:
        """Run one batch of actions, then one step of chat. Returns False when the thread should
        end."""
        with self._changed:
            while not self._has_work():
                if self._closing and not self._chats.may_continue(self._close_at):
                    return False
                self._monitor.idle = True
                self._changed.wait(self._wait_timeout())
            self._monitor.idle = False
            if self._closing and time.monotonic() >= self._close_at:
                return False
            actions = self._actions.take(self.limits.max_action_batch)
            cancelled, self._cancelled = self._cancelled, []
            self._chats.admit()
            prepared = self._chats.take_prepared()
        if self._action_runner is not None:
            self._action_runner.run(actions)
            self._monitor.note_progress()
        if self._chat_runner is not None:
            for request, prompt in prepared:
                self._chat_runner.add(request, prompt)
            for request in cancelled:
                self._chat_runner.cancel(request)
            self._chat_runner.step()
        if self._check_due():
            self._monitor.repeat_checks()
        time.sleep(YIELD_S)
        return True

    def _has_work(self) -> bool:
        return bool(
            self._actions
            or self._cancelled
            or (self._chat_runner is not None and self._chat_runner.busy)
            or self._chats.has_work()
            or self._check_due()
        )

    def _check_due(self) -> bool:
        return not self._closing and self._monitor.check_due()

    def _wait_timeout(self) -> float | None:
        """Return how long to wait for work [s]; None for no timeout."""
        until = self._close_at if self._closing else self._monitor.next_check()
        return max(0.0, until - time.monotonic()) if until < float("inf") else None

    def _fail_all(self, error: Exception) -> None:
        """End every unfinished request with this error."""
        with self._changed:
            self._ended = error
            actions = self._actions.take(len(self._actions))
            chats = self._chats.close()
        for action in actions:
            if action.done.set_running_or_notify_cancel():
                action.done.set_exception(error)
        for request in chats:
            request.publish(error)
        if self._chat_runner is not None:
            self._chat_runner.fail_all(error)
        self.ready.set()
