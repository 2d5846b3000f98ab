"""What waits for the model, and how it is told: queues that are fair to clients, and two kinds of jobs."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Hashable, Sequence
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

from blm.types import (
    ActionChunk,
    BlmError,
    Message,
    Observation,
    Policy,
    PolicyContract,
    Sampling,
)

log = logging.getLogger(__name__)
Job = TypeVar("Job", bound=Hashable)


class BusyError(BlmError):
    """The queue is full, or the server is going down; try again later."""


class ModelError(RuntimeError):
    """The model, or the thread that runs it, did not do what it should."""


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """How much the engine takes on at a time."""

    actions_waiting: int = 256
    actions_per_client: int = 64
    """Observations of one client that may wait."""
    chats_waiting: int = 64
    chats_per_client: int = 32
    actions_together: int = 32
    """Observations in one pass."""
    answers_together: int = 16
    """Answers in progress."""
    prompts_together: int = 4
    """Prompts that are being tokenised and read; they take turns."""
    cache_tokens: int = 65_536
    """Tokens whose keys and values all answers in progress may keep."""
    stall_s: float = 30.0
    """Work that does not move for so long means that the model's thread hangs."""
    check_s: float = 1.0
    """How often a failed model is tried again."""


class FairQueue(Generic[Job]):
    """Jobs by client. Clients take turns, so that one with many jobs holds up another for one job only."""

    def __init__(self, kind: str, limit: int, per_client: int) -> None:
        self.kind, self.limit, self.per_client = kind, limit, per_client
        self._clients = OrderedDict[Hashable, dict[Job, None]]()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, job: Job, client: Hashable | None) -> None:
        """Append a job. Jobs without a client share one turn. Raises BusyError when there is no room."""
        mine = self._clients.get(client, {})
        if self._count >= self.limit:
            raise BusyError(f"{self.limit} {self.kind} requests are waiting already; try again")
        if client is not None and len(mine) >= self.per_client:
            raise BusyError(
                f"{self.per_client} {self.kind} requests of this client are waiting already, which is its "
                "limit; try again"
            )
        mine[job] = None
        self._clients[client] = mine
        self._count += 1

    def pop(self) -> Job | None:
        """Take the first job of the client whose turn it is; None when nobody waits."""
        if not self._clients:
            return None
        client, jobs = self._clients.popitem(last=False)
        job = next(iter(jobs))
        del jobs[job]
        self._count -= 1
        if jobs:
            self._clients[client] = jobs
        return job

    def first(self) -> Job | None:
        """Return what `pop` would take."""
        return next(iter(next(iter(self._clients.values()))), None) if self._clients else None

    def take(self, most: int) -> list[Job]:
        """Take at most so many jobs, from the clients in turn."""
        return [job for _ in range(min(most, self._count)) if (job := self.pop()) is not None]

    def remove(self, job: Job, client: Hashable | None) -> bool:
        """Take out a job that nobody waits for; False if it is not here any more."""
        jobs = self._clients.get(client, {})
        if job not in jobs:
            return False
        del jobs[job]
        self._count -= 1
        if not jobs:
            del self._clients[client]
        return True


@dataclass(frozen=True)
class Acted:
    chunk: ActionChunk
    infer_ms: float
    """Of the pass that made it."""
    together: int
    """Observations in that pass."""


@dataclass(frozen=True, eq=False)
class ActionJob:
    observation: Observation
    deadline: float
    done: Future[Acted]


@dataclass(frozen=True)
class Snapshot:
    """One answer as far as it has come."""

    text: str
    tokens: int
    ended: Literal["stop", "length"] | None


@dataclass(eq=False)
class ChatJob:
    """A conversation with its answers; iterate over snapshots of all answers. Slow readers skip some."""

    messages: Sequence[Message]
    samplings: Sequence[Sampling]
    loop: asyncio.AbstractEventLoop
    client: Hashable | None = None
    answers: Sequence[GeneratedAnswer] = ()
    prompt_tokens: int = 0
    cache_tokens: int = 0
    """What its answers may come to keep."""
    left: bool = False
    """Nobody listens any more."""
    _latest: list[Snapshot] | Exception | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, latest: list[Snapshot] | Exception) -> None:
        """Replace what the reader sees next; from any thread."""
        try:
            self.loop.call_soon_threadsafe(self._set, latest)
        except RuntimeError:  # its event loop is gone, and with it whoever asked
            log.info("an answer came after its reader had gone")

    def _set(self, latest: list[Snapshot] | Exception) -> None:
        if not isinstance(self._latest, Exception):
            self._latest = latest
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[list[Snapshot]]:
        """Yield the state of all answers as it changes. Raises what went wrong in the model's thread."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            latest = self._latest
            if isinstance(latest, Exception):
                raise latest
            assert latest is not None
            yield latest
            if all(snapshot.ended for snapshot in latest):
                return


class GeneratedAnswer(Protocol):
    """An answer in progress. It may have an `error`, of what ended it but for its tokens."""

    tokens: list[int]
    ended: Literal["stop", "length"] | None
    """By the model's end token, or for want of room; None: it goes on."""

    @property
    def prompt_tokens(self) -> int: ...


class TokenGenerator(Protocol):
    """Gives several answers at once, each token by token."""

    @property
    def running(self) -> Sequence[Any]: ...

    def start(
        self, conversations: Sequence[Sequence[Message]], samplings: Sequence[Sampling]
    ) -> Sequence[GeneratedAnswer]: ...

    def step(self) -> None: ...

    def drop(self, answer: Any) -> None: ...

    def text(self, answer: Any) -> str: ...


class PreparedPrompt(Protocol):
    @property
    def tokens(self) -> int: ...

    @property
    def cache_tokens(self) -> int: ...


@runtime_checkable
class PiecewiseGenerator(TokenGenerator, Protocol):
    """One that tokenises in any thread and reads prompts in pieces, such as `Generation`."""

    def prepare(self, messages: Sequence[Message], samplings: Sequence[Sampling]) -> PreparedPrompt: ...

    def begin(self, prompt: Any) -> Any: ...

    def advance(self, prefill: Any) -> Sequence[GeneratedAnswer] | None: ...


@runtime_checkable
class BatchPolicy(Policy, Protocol):
    """A policy that answers several observations in one pass."""

    def act_batch(self, observations: Sequence[Observation]) -> Sequence[ActionChunk]: ...


def as_exception(error: BaseException) -> Exception:
    """Return an error that a waiting task can be given: some end its event loop or cannot be raised there."""
    dangerous = StopIteration | StopAsyncIteration | FutureCancelledError
    if isinstance(error, Exception) and not isinstance(error, dangerous):
        return error
    return ModelError(f"the model's code raised {type(error).__name__}")


def check_chunk(chunk: Any, observation: Observation, contract: PolicyContract) -> ActionChunk:
    """Return a chunk that a robot may be sent. Raises ModelError for another shape or type, or NaN."""
    dim = contract.action_spaces[observation.robot].dim
    if not isinstance(chunk, ActionChunk):
        raise ModelError(f"the policy gave {type(chunk).__name__} instead of an ActionChunk")
    actions = np.asarray(chunk.actions)
    if actions.dtype.kind not in "fiu" or actions.ndim != 2 or actions.shape[1] != dim or not len(actions):
        raise ModelError(
            f"the policy gave actions of {actions.dtype} {actions.shape}; needed for '{observation.robot}': "
            f"numbers (steps, {dim})"
        )
    if not np.isfinite(actions).all():
        raise ModelError("the policy gave actions that are not finite; they are not sent")
    return chunk


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
