"""One thread runs the model for everybody: actions in batches, and chat in small pieces between them.

An action never waits for a whole prompt or answer: between two batches of actions the model encodes a few
pictures, reads one piece of a prompt, or makes one token of some answers. Tokenising and the preparation of
pictures happen in another thread.
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
from typing import Literal, TypeAlias

from blm.serving.model_thread import ActionWork, ChatWork
from blm.serving.requests import (
    Acted,
    ActionJob,
    BatchPolicy,
    BusyError,
    ChatJob,
    EngineLimits,
    FairQueue,
    ModelError,
    PiecewiseGenerator,
    PreparedPrompt,
    TokenGenerator,
    as_exception,
    blank_observation,
)
from blm.types import BlmError, ChatCapacity, Message, Observation, Policy, Sampling

__all__ = [
    "Acted",
    "BatchPolicy",
    "BusyError",
    "Engine",
    "EngineLimits",
    "Health",
    "ModelError",
    "Room",
    "Speaker",
    "blank_observation",
]
log = logging.getLogger(__name__)
YIELD_S = 2e-4
"""Pause after each turn. A thread that waits for Python's lock is woken whenever torch lets go of it, and
seldom gets it in time: without a pause the event loop stood still for 4 s, on two busy cores, until a prompt
was read."""
SWITCH_S = 5e-4
"""How long another thread keeps Python's lock when the model's wants it back (`sys.setswitchinterval`). A
decision asks for it about 700 times; with Python's own 5 ms one thread that reads JSON makes it 3.5 s."""
Room: TypeAlias = EngineLimits
Speaker: TypeAlias = TokenGenerator


@dataclass(frozen=True)
class Health:
    """Whether the model works. "ok" after the last try or answer succeeded and while its thread moves."""

    status: Literal["warming up", "ok", "failed", "closing"]
    reason: str = ""


class Engine:
    """The model's thread and the queues before it."""

    def __init__(
        self, policy: Policy | None, speaker: TokenGenerator | None, room: EngineLimits | None = None
    ) -> None:
        self.policy, self.speaker, self.room = policy, speaker, room or EngineLimits()
        limits = self.room
        self.ready = threading.Event()
        """Set when the model has been tried once."""
        self._acting = ActionWork(policy) if policy is not None else None
        self._chatting = ChatWork(speaker, limits) if speaker is not None else None
        self._actions = FairQueue[ActionJob]("action", limits.actions_waiting, limits.actions_per_client)
        self._chats = FairQueue[ChatJob]("chat", limits.chats_waiting, limits.chats_per_client)
        self._preparing = dict[ChatJob, float]()
        """Conversations that are being tokenised, and since when."""
        self._prepared = list[tuple[ChatJob, PreparedPrompt | None]]()
        self._left = list[ChatJob]()
        self._changed, self._closing, self._end = threading.Condition(), False, float("inf")
        self._ended: Exception | None = None
        """Why the thread takes nothing any more."""
        self._idle, self._moved, self._next_check = False, time.monotonic(), 0.0
        self._to_tokenise = queue.SimpleQueue[ChatJob | None]()
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
        self._thread = threading.Thread(target=self._run, name="blm-model", daemon=True)
        self._thread.start()
        threading.Thread(target=self._tokenise_all, name="blm-tokeniser", daemon=True).start()

    # --- callers ---

    async def act(
        self, observation: Observation, within_s: float = float("inf"), client: Hashable | None = None
    ) -> Acted:
        """Return the next chunk. `client`: who asks; clients are served in turn.

        Raises BusyError, LateError, ModelError, and whatever the policy raises.
        """
        job = ActionJob(observation, time.monotonic() + within_s, Future())
        with self._changed:
            self._require_open(self._acting, "policy")
            self._actions.put(job, client)
            self._wake()
        try:
            return await asyncio.wrap_future(job.done)
        finally:
            job.done.cancel()
            with self._changed:
                self._actions.remove(job, client)  # of a caller that left: its place is free at once

    def talk(
        self, messages: Sequence[Message], samplings: Sequence[Sampling], client: Hashable | None = None
    ) -> ChatJob:
        """Begin answers to one conversation, one for each sampling. Raises BusyError; `leave` ends them."""
        job = ChatJob(messages, samplings, asyncio.get_running_loop(), client)
        with self._changed:
            self._require_open(self._chatting, "chat")
            self._chats.put(job, client)
            self._wake()
        return job

    def leave(self, talk: ChatJob) -> None:
        """Nobody listens any more: its answers stop with the piece of work in progress."""
        with self._changed:
            talk.left = True
            if not self._chats.remove(talk, talk.client):
                self._left.append(talk)
            self._wake()

    @property
    def capacity(self) -> ChatCapacity | None:
        """What one chat request can hold at most; None without chat or for a generator that does not say."""
        return getattr(self.speaker, "capacity", None)

    @property
    def waiting(self) -> dict[str, int]:
        """How many wait, or are being answered."""
        chatting = self._chatting
        return {
            "actions": len(self._actions),
            "chats": len(self._chats) + len(self._preparing) + len(self._prepared),
            "answers": len(chatting.answering) + len(chatting.before_first_token()) if chatting else 0,
        }

    @property
    def failed(self) -> Exception | None:
        """Why the model does not work, or None."""
        health = self.health()
        return ModelError(health.reason) if health.status == "failed" else None

    def health(self) -> Health:
        """Tell whether the model can answer now; from any thread, at once."""
        if not self._thread.is_alive() and not self._closing:
            return Health("failed", f"the model's thread has ended: {self._ended!r}")
        if self._closing:
            return Health("closing", "the server is going down")
        if not self.ready.is_set():
            return Health("warming up")
        now, since = time.monotonic(), min(self._preparing.copy().values(), default=float("inf"))
        for what, began in (("model", float("inf") if self._idle else self._moved), ("tokeniser", since)):
            if now - began > self.room.stall_s:
                return Health("failed", f"the {what} has not moved for {now - began:.0f} s while work waits")
        for work in (self._acting, self._chatting):
            if work is not None and work.error is not None:
                return Health("failed", repr(work.error))
        return Health("ok")

    def close(self, grace_s: float = 0.0) -> None:
        """Take nothing new; give what has begun so long to end, then end it with BusyError."""
        with self._changed:
            self._closing, self._end = True, min(self._end, time.monotonic() + grace_s)
            self._changed.notify()

    def join(self) -> None:
        """Wait until the thread has ended, after `close`."""
        self._thread.join()

    def _require_open(self, work: ActionWork | ChatWork | None, what: str) -> None:
        if work is None:
            raise BlmError(f"this server has no {what}")
        if self._closing:
            raise BusyError("the server is going down")
        if self._ended is not None:
            raise self._ended

    def _wake(self) -> None:
        if self._idle:
            self._idle, self._moved = False, time.monotonic()
        self._changed.notify()

    # --- the model's thread ---

    def _run(self) -> None:
        error: Exception | None = None
        try:
            for work in (self._acting, self._chatting):
                if work is not None:
                    work.check()
            self._moved = time.monotonic()
            self.ready.set()
            while self._turn():
                self._moved = time.monotonic()
        except BaseException as problem:  # a fault of this module: whoever waits must know
            log.critical("the model's thread has ended", exc_info=problem)
            error = ModelError(f"the model's thread has ended: {as_exception(problem)!r}")
        finally:
            self._finish(error or BusyError("the server is going down"))

    def _turn(self) -> bool:
        """One batch of actions, then one piece of chat; False when the thread shall end."""
        with self._changed:
            while not self._has_work():
                if self._closing and not (self._preparing or (time.monotonic() < self._end and self._chats)):
                    return False
                self._idle = True
                self._changed.wait(self._patience())
            self._idle = False
            if self._closing and time.monotonic() >= self._end:
                return False
            actions = self._actions.take(self.room.actions_together)
            left, self._left = self._left, []
            self._begin_chats()
            prepared, self._prepared = self._prepared, []
        if self._acting is not None:
            self._acting.serve(actions)
            self._moved = time.monotonic()
        if self._chatting is not None:
            for job, prompt in prepared:
                self._chatting.add(job, prompt)
            for job in left:
                self._chatting.forget(job)
            self._chatting.work()
        self._check_suspects()
        time.sleep(YIELD_S)
        return True

    def _has_work(self) -> bool:
        chatting = self._chatting is not None and self._chatting.busy
        return bool(
            self._actions
            or self._left
            or self._prepared
            or chatting
            or self._chats_can_begin()
            or self._due()
        )

    def _chats_can_begin(self) -> bool:
        """Whether there is room for the next conversation; one that is larger than all room comes alone."""
        following = self._chats.first()
        if following is None:
            return False
        begun = [*self._preparing, *(job for job, _ in self._prepared)]
        answering = list[ChatJob]()
        if self._chatting is not None:
            begun += self._chatting.before_first_token()
            answering = self._chatting.answering
        answers = sum(len(job.samplings) for job in (*begun, *answering, following))
        return len(begun) < self.room.prompts_together and (
            answers <= self.room.answers_together or not (begun or answering)
        )

    def _begin_chats(self) -> None:
        """Hand conversations to the tokeniser; those that need none can go on."""
        while self._chats_can_begin():
            job = self._chats.pop()
            assert job is not None
            if isinstance(self.speaker, PiecewiseGenerator):
                self._preparing[job] = time.monotonic()
                self._to_tokenise.put(job)
            else:
                self._prepared.append((job, None))

    def _suspects(self) -> list[ActionWork | ChatWork]:
        works = (self._acting, self._chatting)
        return [work for work in works if work is not None and (work.suspect or work.error is not None)]

    def _due(self) -> bool:
        return not self._closing and bool(self._suspects()) and time.monotonic() >= self._next_check

    def _patience(self) -> float | None:
        """How long to wait for work [s]; None: until there is some."""
        ends = [self._end] if self._closing else [self._next_check] if self._suspects() else []
        finite = [end - time.monotonic() for end in ends if end < float("inf")]
        return max(0.0, min(finite)) if finite else None

    def _check_suspects(self) -> None:
        """Try again what has failed, so that health tells what is and not what was."""
        if self._due():
            for work in self._suspects():
                work.check()
            self._next_check = time.monotonic() + self.room.check_s

    def _finish(self, error: Exception) -> None:
        """Tell everybody who waits."""
        with self._changed:
            self._ended = error
            actions, chats = self._actions.take(len(self._actions)), self._chats.take(len(self._chats))
            chats += [*self._preparing, *(job for job, _ in self._prepared)]
            self._preparing.clear()
        for action in actions:
            if action.done.set_running_or_notify_cancel():
                action.done.set_exception(error)
        for job in chats:
            job.tell(error)
        if self._chatting is not None:
            self._chatting.end(error)
        self._to_tokenise.put(None)
        self.ready.set()

    # --- the tokeniser's thread ---

    def _tokenise_all(self) -> None:
        while (job := self._to_tokenise.get()) is not None:
            prompt, problem = None, None
            try:
                assert isinstance(self.speaker, PiecewiseGenerator)
                if not job.left:
                    prompt = self.speaker.prepare(job.messages, job.samplings)
            except BaseException as error:
                problem = as_exception(error)
            with self._changed:
                self._preparing.pop(job, None)
                if prompt is not None and not job.left:
                    self._prepared.append((job, prompt))
                if problem is not None and not isinstance(problem, BlmError) and self._chatting is not None:
                    self._chatting.suspect = True
                self._wake()
            if problem is not None:
                job.tell(problem)
