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
import queue
import sys
import threading
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

from blm.serving.requests import (
    ActionRequest,
    ActionResult,
    BatchPolicy,
    BusyError,
    ChatRequest,
    ChunkedPrefillGenerator,
    FairQueue,
    ModelError,
    PreparedPrompt,
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


@dataclass(frozen=True)
class Health:
    """Whether the model works. "ok" while the model thread makes progress, and the last request or
    health check succeeded."""

    status: Literal["warming up", "ok", "failed", "closing"]
    reason: str = ""


class ModelScheduler:
    """The model thread, and the request queues in front of it."""

    def __init__(
        self, policy: Policy | None, generator: TokenGenerator | None, limits: SchedulerLimits | None = None
    ) -> None:
        self.policy, self.generator = policy, generator
        self.limits = limits = limits or SchedulerLimits()
        self.ready = threading.Event()
        """Set after the first health check."""
        self._action_runner = ActionRunner(policy) if policy is not None else None
        self._chat_runner = ChatRunner(generator, limits) if generator is not None else None
        self._actions = FairQueue[ActionRequest](
            "action", limits.max_queued_actions, limits.max_queued_actions_per_client
        )
        self._chats = FairQueue[ChatRequest](
            "chat", limits.max_queued_chats, limits.max_queued_chats_per_client
        )
        self._tokenizing = dict[ChatRequest, float]()
        """Chat requests in the tokenizer thread -> when they got there [s, monotonic]."""
        self._prepared = list[tuple[ChatRequest, PreparedPrompt | None]]()
        self._cancelled = list[ChatRequest]()
        self._changed = threading.Condition()
        self._closing = False
        self._close_at = float("inf")
        """When unfinished requests receive an error [s, monotonic]."""
        self._ended: Exception | None = None
        """The error for every new request once the model thread has ended."""
        self._idle = False
        self._progress_at = time.monotonic()
        self._next_check = 0.0
        self._to_tokenize = queue.SimpleQueue[ChatRequest | None]()
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
        self._thread = threading.Thread(target=self._run, name="blm-model", daemon=True)
        self._thread.start()
        threading.Thread(target=self._tokenize_all, name="blm-tokenizer", daemon=True).start()

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
            self._chats.put(request, client)
            self._wake()
        return request

    def cancel(self, request: ChatRequest) -> None:
        """Stop a chat request after the current step; does nothing if it has finished."""
        with self._changed:
            request.cancelled = True
            if not self._chats.remove(request, request.client):
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
            "chats": len(self._chats) + len(self._tokenizing) + len(self._prepared),
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
        if not self.ready.is_set():
            return Health("warming up")
        now = time.monotonic()
        model_since = float("inf") if self._idle else self._progress_at
        tokenizer_since = min(self._tokenizing.copy().values(), default=float("inf"))
        for name, since in (("model", model_since), ("tokenizer", tokenizer_since)):
            if now - since > self.limits.stall_s:
                return Health("failed", f"the {name} thread has made no progress for {now - since:.0f} s")
        for runner in (self._action_runner, self._chat_runner):
            if runner is not None and runner.error is not None:
                return Health("failed", repr(runner.error))
        return Health("ok")

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
        if self._idle:
            self._idle, self._progress_at = False, time.monotonic()
        self._changed.notify()

    # --- the model thread ---

    def _run(self) -> None:
        error: Exception | None = None
        try:
            for runner in (self._action_runner, self._chat_runner):
                if runner is not None:
                    runner.check()
            self._progress_at = time.monotonic()
            self.ready.set()
            while self._iterate():
                self._progress_at = time.monotonic()
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
                if self._closing and not self._may_still_chat():
                    return False
                self._idle = True
                self._changed.wait(self._wait_timeout())
            self._idle = False
            if self._closing and time.monotonic() >= self._close_at:
                return False
            actions = self._actions.take(self.limits.max_action_batch)
            cancelled, self._cancelled = self._cancelled, []
            self._admit_chats()
            prepared, self._prepared = self._prepared, []
        if self._action_runner is not None:
            self._action_runner.run(actions)
            self._progress_at = time.monotonic()
        if self._chat_runner is not None:
            for request, prompt in prepared:
                self._chat_runner.add(request, prompt)
            for request in cancelled:
                self._chat_runner.cancel(request)
            self._chat_runner.step()
        self._repeat_checks()
        time.sleep(YIELD_S)
        return True

    def _has_work(self) -> bool:
        return bool(
            self._actions
            or self._cancelled
            or self._prepared
            or (self._chat_runner is not None and self._chat_runner.busy)
            or self._can_admit_chat()
            or self._check_due()
        )

    def _may_still_chat(self) -> bool:
        """Whether a chat request may still come to the model during the grace period."""
        return bool(self._tokenizing or (time.monotonic() < self._close_at and self._chats))

    def _can_admit_chat(self) -> bool:
        """Whether the next chat request fits; one that exceeds the limits is admitted alone."""
        following = self._chats.first()
        if following is None:
            return False
        started = [*self._tokenizing, *(request for request, _ in self._prepared)]
        decoding = list[ChatRequest]()
        if self._chat_runner is not None:
            started += self._chat_runner.before_first_token()
            decoding = self._chat_runner.decoding
        sequences = sum(len(request.samplings) for request in (*started, *decoding, following))
        return len(started) < self.limits.max_prefills and (
            sequences <= self.limits.max_sequences or not (started or decoding)
        )

    def _admit_chats(self) -> None:
        """Pass queued chat requests to the tokenizer thread, or on at once if the generator needs
        none."""
        while self._can_admit_chat():
            request = self._chats.pop()
            assert request is not None
            if isinstance(self.generator, ChunkedPrefillGenerator):
                self._tokenizing[request] = time.monotonic()
                self._to_tokenize.put(request)
            else:
                self._prepared.append((request, None))

    def _to_check(self) -> list[ActionRunner | ChatRunner]:
        runners = (self._action_runner, self._chat_runner)
        return [one for one in runners if one is not None and (one.needs_check or one.error is not None)]

    def _check_due(self) -> bool:
        return not self._closing and bool(self._to_check()) and time.monotonic() >= self._next_check

    def _wait_timeout(self) -> float | None:
        """Return how long to wait for work [s]; None for no timeout."""
        if self._closing:
            until = self._close_at
        elif self._to_check():
            until = self._next_check
        else:
            return None
        return max(0.0, until - time.monotonic()) if until < float("inf") else None

    def _repeat_checks(self) -> None:
        """Repeat the health check of a runner that failed, so that `health` reports the present
        state."""
        if self._check_due():
            for runner in self._to_check():
                runner.check()
            self._next_check = time.monotonic() + self.limits.check_s

    def _fail_all(self, error: Exception) -> None:
        """End every unfinished request with this error."""
        with self._changed:
            self._ended = error
            actions = self._actions.take(len(self._actions))
            chats = self._chats.take(len(self._chats))
            chats += [*self._tokenizing, *(request for request, _ in self._prepared)]
            self._tokenizing.clear()
        for action in actions:
            if action.done.set_running_or_notify_cancel():
                action.done.set_exception(error)
        for request in chats:
            request.publish(error)
        if self._chat_runner is not None:
            self._chat_runner.fail_all(error)
        self._to_tokenize.put(None)
        self.ready.set()

    # --- the tokenizer thread ---

    def _tokenize_all(self) -> None:
        while (request := self._to_tokenize.get()) is not None:
            prompt: PreparedPrompt | None = None
            problem: Exception | None = None
            try:
                assert isinstance(self.generator, ChunkedPrefillGenerator)
                if not request.cancelled:
                    prompt = self.generator.prepare(request.messages, request.samplings)
            except BaseException as error:
                problem = as_exception(error)
            with self._changed:
                self._tokenizing.pop(request, None)
                if prompt is not None and not request.cancelled:
                    self._prepared.append((request, prompt))
                user_error = problem is None or isinstance(problem, BlmError)
                if not user_error and self._chat_runner is not None:
                    self._chat_runner.needs_check = True
                self._wake()
            if problem is not None:
                request.publish(problem)
