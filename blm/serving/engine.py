"""One thread runs the model for everybody: actions in batches, and answers token by token between them.

An action never waits for a whole answer: between two batches of actions the model reads one conversation or
makes one token of all answers in progress, no more.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from blm.types import (
    ActionChunk,
    BlmError,
    ChatCapacity,
    LateError,
    Message,
    Observation,
    Policy,
    PolicyContract,
    Sampling,
)

log = logging.getLogger(__name__)


class Spoken(Protocol):
    """An answer in progress."""

    tokens: list[int]
    ended: Literal["stop", "length"] | None
    """By the model's end token, or for want of room; None: it goes on."""

    @property
    def prompt_tokens(self) -> int: ...


class Speaker(Protocol):
    """Gives several answers at once, each token by token; `blm.backbone.generation.Generation` is one."""

    @property
    def running(self) -> Sequence[Any]: ...

    def start(
        self, conversations: Sequence[Sequence[Message]], samplings: Sequence[Sampling]
    ) -> Sequence[Spoken]: ...

    def step(self) -> None: ...

    def drop(self, answer: Any) -> None: ...

    def text(self, answer: Any) -> str: ...


@runtime_checkable
class BatchPolicy(Policy, Protocol):
    """A policy that answers several observations in one pass."""

    def act_batch(self, observations: Sequence[Observation]) -> Sequence[ActionChunk]: ...


class BusyError(BlmError):
    """The line is full, or the server is going down; try again later."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """How much the engine takes on at a time."""

    actions_waiting: int = 256
    chats_waiting: int = 64
    actions_together: int = 32
    """Observations in one pass."""
    answers_together: int = 16
    """Answers in progress."""


@dataclass(frozen=True)
class Acted:
    chunk: ActionChunk
    infer_ms: float
    """Of the pass that made it."""
    together: int
    """Observations in that pass."""


@dataclass(frozen=True)
class Said:
    """One answer as far as it has come."""

    text: str
    tokens: int
    ended: Literal["stop", "length"] | None


@dataclass(frozen=True)
class _Act:
    observation: Observation
    deadline: float
    done: Future[Acted]


@dataclass(eq=False)
class Talk:
    """A conversation with its answers; iterate over what has been said so far, last state of each answer."""

    messages: Sequence[Message]
    samplings: Sequence[Sampling]
    loop: asyncio.AbstractEventLoop
    news: asyncio.Queue[list[Said] | Exception] = field(default_factory=asyncio.Queue)
    answers: Sequence[Spoken] = ()
    prompt_tokens: int = 0

    def tell(self, news: list[Said] | Exception) -> None:
        try:
            self.loop.call_soon_threadsafe(self.news.put_nowait, news)
        except RuntimeError:  # its event loop is gone, and with it whoever asked
            log.info("an answer came after its listener had gone")

    async def __aiter__(self) -> AsyncIterator[list[Said]]:
        """Yield the state of all answers after each token. Raises what went wrong in the model's thread."""
        while True:
            news = await self.news.get()
            while not self.news.empty() and not isinstance(news, Exception):
                news = self.news.get_nowait()
            if isinstance(news, Exception):
                raise news
            yield news
            if all(said.ended for said in news):
                return


class Engine:
    """The model's thread and the lines before it."""

    def __init__(self, policy: Policy | None, speaker: Speaker | None, room: Room | None = None) -> None:
        self.policy, self.speaker, self.room = policy, speaker, room or Room()
        self.ready = threading.Event()
        """Set when the model has run once."""
        self.failed: Exception | None = None
        """What ended the warm-up."""
        self._acts, self._asked = deque[_Act](), deque[Talk]()
        self._talks, self._left = list[Talk](), list[Talk]()
        self._news, self._closing, self._end = threading.Condition(), False, float("inf")
        self._thread = threading.Thread(target=self._run, name="blm-model", daemon=True)
        self._thread.start()

    # --- callers, in the event loop ---

    async def act(self, observation: Observation, within_s: float = float("inf")) -> Acted:
        """Return the next chunk. Raises BusyError, LateError, and whatever the policy raises."""
        job = _Act(observation, time.monotonic() + within_s, Future())
        with self._news:
            self._admit("action", len(self._acts), self.room.actions_waiting)
            self._acts.append(job)
            self._news.notify()
        try:
            return await asyncio.wrap_future(job.done)
        finally:
            job.done.cancel()  # of a caller that left: not worked on any more

    def talk(self, messages: Sequence[Message], samplings: Sequence[Sampling]) -> Talk:
        """Begin answers to one conversation, one for each sampling. Raises BusyError; `leave` ends them."""
        talk = Talk(messages, samplings, asyncio.get_running_loop())
        with self._news:
            self._admit("chat", len(self._asked), self.room.chats_waiting)
            self._asked.append(talk)
            self._news.notify()
        return talk

    def leave(self, talk: Talk) -> None:
        """Nobody listens any more: its answers stop with the token in progress."""
        with self._news:
            if talk in self._asked:
                self._asked.remove(talk)
            self._left.append(talk)
            self._news.notify()

    @property
    def capacity(self) -> ChatCapacity | None:
        """What one chat request can hold at most; None without chat or for a speaker that does not say."""
        return getattr(self.speaker, "capacity", None)

    @property
    def waiting(self) -> dict[str, int]:
        """How many wait, or are being answered."""
        return {"actions": len(self._acts), "chats": len(self._asked), "answers": len(self._talks)}

    def close(self, grace_s: float = 0.0) -> None:
        """Take nothing new; give what has begun so long to end, then end it with BusyError."""
        with self._news:
            self._closing, self._end = True, min(self._end, time.monotonic() + grace_s)
            self._news.notify()

    def join(self) -> None:
        """Wait until the thread has ended, after `close`."""
        self._thread.join()

    def _admit(self, kind: str, waiting: int, limit: int) -> None:
        if self._closing:
            raise BusyError("the server is going down")
        if waiting >= limit:
            raise BusyError(f"{limit} {kind} requests are waiting already; try again")

    # --- the model's thread ---

    def _run(self) -> None:
        try:
            self._warm_up()
        except Exception as error:
            log.exception("the model failed at its first run")
            self.failed = error
        self.ready.set()
        while self._turn():
            pass

    def _warm_up(self) -> None:
        if self.policy is not None:
            contract = self.policy.contract
            self._actions([blank_observation(contract, robot) for robot in contract.action_spaces])
        if self.speaker is not None:
            self.speaker.start([(Message("user", ("Hello",)),)], [Sampling(max_tokens=2)])
            while self.speaker.running:
                self.speaker.step()

    def _turn(self) -> bool:
        """One batch of actions, then one conversation read or one token of all answers."""
        with self._news:
            while not (self._acts or self._asked or self._talks or self._left or self._closing):
                self._news.wait()
            over = self._closing and time.monotonic() >= self._end
            if over or (self._closing and not (self._acts or self._asked or self._talks)):
                self._dismiss(BusyError("the server is going down"))
                return False
            acts = [self._acts.popleft() for _ in range(min(len(self._acts), self.room.actions_together))]
            left, self._left = self._left, []
            room = self.room.answers_together - sum(len(talk.samplings) for talk in self._talks)
            fits = self._asked and (not self._talks or len(self._asked[0].samplings) <= room)
            asked = self._asked.popleft() if fits else None
        for talk in left:
            self._forget(talk)
        self._serve(acts)
        if asked is not None:
            self._guard([asked], lambda: self._begin(asked))
        elif self._talks:
            self._guard(list(self._talks), self._step)
        return True

    def _serve(self, jobs: Sequence[_Act]) -> None:
        start = time.monotonic()
        jobs = [job for job in jobs if job.done.set_running_or_notify_cancel()]
        for job in (job for job in jobs if start > job.deadline):
            job.done.set_exception(LateError("the deadline passed while the observation waited"))
        jobs = [job for job in jobs if not job.done.done()]
        if not jobs:
            return
        try:
            chunks = self._actions([job.observation for job in jobs])
        except Exception as error:
            if len(jobs) > 1:  # one bad observation harms no other
                for job in jobs:
                    self._serve_alone(job)
            else:
                jobs[0].done.set_exception(error)
            return
        self._reply(jobs, chunks, start)

    def _serve_alone(self, job: _Act) -> None:
        start = time.monotonic()
        try:
            self._reply([job], self._actions([job.observation]), start)
        except Exception as error:
            job.done.set_exception(error)

    def _reply(self, jobs: Sequence[_Act], chunks: Sequence[ActionChunk], start: float) -> None:
        now = time.monotonic()
        for job, chunk in zip(jobs, chunks, strict=True):
            if now > job.deadline:
                job.done.set_exception(LateError("the deadline passed while the model ran"))
            else:
                job.done.set_result(Acted(chunk, 1000 * (now - start), len(jobs)))

    def _actions(self, observations: Sequence[Observation]) -> Sequence[ActionChunk]:
        assert self.policy is not None
        if isinstance(self.policy, BatchPolicy):
            return self.policy.act_batch(observations)
        return [self.policy.act(observation) for observation in observations]

    def _guard(self, talks: Sequence[Talk], work: Callable[[], None]) -> None:
        """Tell these conversations of an error in their work; others and the thread go on."""
        try:
            work()
        except Exception as error:
            if not isinstance(error, BlmError):
                log.exception("the chat failed")
            for talk in talks:
                talk.tell(error)
                self._forget(talk)

    def _begin(self, talk: Talk) -> None:
        assert self.speaker is not None
        talk.answers = self.speaker.start([talk.messages] * len(talk.samplings), talk.samplings)
        talk.prompt_tokens = talk.answers[0].prompt_tokens
        self._talks.append(talk)
        self._tell(talk)

    def _step(self) -> None:
        assert self.speaker is not None
        self.speaker.step()
        for talk in list(self._talks):
            self._tell(talk)

    def _tell(self, talk: Talk) -> None:
        assert self.speaker is not None
        said = [Said(self.speaker.text(answer), len(answer.tokens), answer.ended) for answer in talk.answers]
        talk.tell(said)
        if all(answer.ended for answer in talk.answers):
            self._talks.remove(talk)

    def _forget(self, talk: Talk) -> None:
        if self.speaker is not None:
            for answer in talk.answers:
                self.speaker.drop(answer)
        if talk in self._talks:
            self._talks.remove(talk)

    def _dismiss(self, error: BusyError) -> None:
        for job in self._acts:
            if job.done.set_running_or_notify_cancel():
                job.done.set_exception(error)
        for talk in (*self._asked, *self._talks):
            talk.tell(error)
            self._forget(talk)


def blank_observation(contract: PolicyContract, robot: str) -> Observation:
    """An observation that the contract accepts: black pictures, joints in the middle of their range."""
    space, side = contract.action_spaces[robot], contract.image_size
    return Observation(
        images={camera: np.zeros((side, side, 3), np.uint8) for camera in contract.cameras},
        state=((np.asarray(space.low) + np.asarray(space.high)) / 2).astype(np.float32),
        instruction="hold still.",
        robot=robot,
        seed=0,
    )
