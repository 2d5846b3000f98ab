"""Requests to the model: actions, chat, and a request queue that is fair to clients."""

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
Queued = TypeVar("Queued", bound=Hashable)


class BusyError(BlmError):
    """The request queue is full, or the server is shutting down; clients may retry later."""


class ModelError(RuntimeError):
    """The model or its thread failed or returned an invalid result."""


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """Sizes of queues and batches, and the timeouts of the health check."""

    max_queued_actions: int = 256
    max_queued_actions_per_client: int = 64
    max_queued_chats: int = 64
    max_queued_chats_per_client: int = 32
    max_action_batch: int = 32
    """Maximum number of observations in one forward pass of the policy."""
    max_sequences: int = 16
    """Maximum number of answers that are generated at the same time."""
    max_prefills: int = 4
    """Maximum number of chat requests that are tokenized or prefilled in turn."""
    cache_tokens: int = 65_536
    """Capacity of the KV cache [tokens], shared by all running sequences."""
    stall_s: float = 30.0
    """Time without progress on pending work after which the health check fails [s]."""
    check_s: float = 1.0
    """Time between two checks of a model that has failed [s]."""


class FairQueue(Generic[Queued]):
    """A request queue with one line per client, served round-robin.

    A client with many requests delays the next request of another client by one request only.
    """

    def __init__(self, kind: str, limit: int, per_client: int) -> None:
        """`kind` names the requests in error messages."""
        self.kind, self.limit, self.per_client = kind, limit, per_client
        self._clients = OrderedDict[Hashable, dict[Queued, None]]()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, request: Queued, client: Hashable | None) -> None:
        """Append a request. Raises BusyError if the queue is full.

        Requests without a client share one line.
        """
        line = self._clients.get(client, {})
        if self._count >= self.limit:
            raise BusyError(
                f"Request queue is full: {self.limit} {self.kind} requests are waiting; try again"
            )
        if client is not None and len(line) >= self.per_client:
            raise BusyError(
                f"{self.per_client} {self.kind} requests of this client are waiting, which is the limit per "
                "client; try again"
            )
        line[request] = None
        self._clients[client] = line
        self._count += 1

    def pop(self) -> Queued | None:
        """Remove and return the first request of the next client; None if the queue is empty."""
        if not self._clients:
            return None
        client, line = self._clients.popitem(last=False)
        request = next(iter(line))
        del line[request]
        self._count -= 1
        if line:
            self._clients[client] = line
        return request

    def first(self) -> Queued | None:
        """Return the request that `pop` would return."""
        return next(iter(next(iter(self._clients.values()))), None) if self._clients else None

    def take(self, most: int) -> list[Queued]:
        """Remove and return up to `most` requests, round-robin over the clients."""
        count = min(most, self._count)
        return [request for _ in range(count) if (request := self.pop()) is not None]

    def remove(self, request: Queued, client: Hashable | None) -> bool:
        """Remove a cancelled request. Returns False if it is not in the queue any more."""
        line = self._clients.get(client, {})
        if request not in line:
            return False
        del line[request]
        self._count -= 1
        if not line:
            del self._clients[client]
        return True


@dataclass(frozen=True)
class ActionResult:
    """The reply to an action request."""

    chunk: ActionChunk
    infer_ms: float
    """Duration of the forward pass that produced the chunk [ms]."""
    batch_size: int
    """Number of observations in that forward pass."""


@dataclass(frozen=True, eq=False)
class ActionRequest:
    """An observation that waits for its action chunk."""

    observation: Observation
    deadline: float
    """Deadline on the clock of `time.monotonic` [s]; infinite without a deadline."""
    done: Future[ActionResult]


@dataclass(frozen=True)
class Snapshot:
    """The state of one generated sequence at one moment."""

    text: str
    """The whole text so far."""
    tokens: int
    """Number of generated tokens."""
    ended: Literal["stop", "length"] | None
    """The finish reason; None while the sequence is running."""


@dataclass(eq=False)
class ChatRequest:
    """A conversation and the sequences that are generated for it, one per sampling.

    Asynchronous iteration yields the newest snapshot of every sequence. A slow reader skips
    intermediate snapshots.
    """

    messages: Sequence[Message]
    samplings: Sequence[Sampling]
    loop: asyncio.AbstractEventLoop
    """The event loop of the reader."""
    client: Hashable | None = None
    sequences: Sequence[GeneratedSequence] = ()
    prompt_tokens: int = 0
    cache_tokens: int = 0
    """Upper bound of the KV-cache entries of its sequences."""
    cancelled: bool = False
    _latest: list[Snapshot] | Exception | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def publish(self, latest: list[Snapshot] | Exception) -> None:
        """Replace the snapshots that the reader sees next. May be called from any thread."""
        try:
            self.loop.call_soon_threadsafe(self._set, latest)
        except RuntimeError:  # the reader's event loop is closed
            log.info("discarded the update of a chat request: its reader is gone")

    def _set(self, latest: list[Snapshot] | Exception) -> None:
        if not isinstance(self._latest, Exception):
            self._latest = latest
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[list[Snapshot]]:
        """Yield the snapshots of all sequences on changes. Raises the model's error."""
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


class GeneratedSequence(Protocol):
    """A sequence in progress. An optional `error` holds the exception that ended it."""

    tokens: list[int]
    ended: Literal["stop", "length"] | None
    """Finish reason: "stop" (end token), "length" (token limit), or None while running."""

    @property
    def prompt_tokens(self) -> int: ...


class TokenGenerator(Protocol):
    """Generates several sequences at once, token by token."""

    @property
    def running(self) -> Sequence[Any]: ...

    def start(
        self, conversations: Sequence[Sequence[Message]], samplings: Sequence[Sampling]
    ) -> Sequence[GeneratedSequence]:
        """Prefill the conversations and generate the first token of each sequence."""
        ...

    def step(self) -> None:
        """Generate the next token of running sequences."""
        ...

    def drop(self, answer: Any) -> None:
        """Abandon a sequence."""
        ...

    def text(self, answer: Any) -> str:
        """Return the text of a sequence so far."""
        ...


class PreparedPrompt(Protocol):
    """A tokenized prompt."""

    @property
    def tokens(self) -> int: ...

    @property
    def cache_tokens(self) -> int: ...


@runtime_checkable
class ChunkedPrefillGenerator(TokenGenerator, Protocol):
    """A generator with chunked prefill, such as `Generation`.

    It tokenizes in any thread, and prefills a prompt in bounded steps.
    """

    def prepare(self, messages: Sequence[Message], samplings: Sequence[Sampling]) -> PreparedPrompt: ...

    def begin(self, prompt: Any) -> Any: ...

    def advance(self, prefill: Any) -> Sequence[GeneratedSequence] | None:
        """Run one step of a prefill; return its sequences after the last step, or None."""
        ...


@runtime_checkable
class BatchPolicy(Policy, Protocol):
    """A policy that decides on several observations in one forward pass."""

    def act_batch(self, observations: Sequence[Observation]) -> Sequence[ActionChunk]: ...


def as_exception(error: BaseException) -> Exception:
    """Return an exception that is safe to raise in a waiting task.

    StopIteration cannot be raised in a coroutine, and CancelledError or SystemExit would end the
    wrong task.
    """
    dangerous = StopIteration | StopAsyncIteration | FutureCancelledError
    if isinstance(error, Exception) and not isinstance(error, dangerous):
        return error
    return ModelError(f"the model's code raised {type(error).__name__}")


def check_chunk(chunk: Any, observation: Observation, contract: PolicyContract) -> ActionChunk:
    """Return a chunk that may be sent to a robot.

    Raises ModelError for a wrong shape or type, or NaN.
    """
    dim = contract.action_spaces[observation.robot].dim
    if not isinstance(chunk, ActionChunk):
        raise ModelError(f"the policy returned {type(chunk).__name__} instead of an ActionChunk")
    actions = np.asarray(chunk.actions)
    if actions.dtype.kind not in "fiu" or actions.ndim != 2 or actions.shape[1] != dim or not len(actions):
        raise ModelError(
            f"the policy returned actions of {actions.dtype} {actions.shape}; '{observation.robot}' needs "
            f"numbers of shape (steps, {dim})"
        )
    if not np.isfinite(actions).all():
        raise ModelError("the policy returned actions that are not finite; they are not sent")
    return chunk


def blank_observation(contract: PolicyContract, robot: str) -> Observation:
    """Return a valid observation: black images, every joint in the middle of its range."""
    space, side = contract.action_spaces[robot], contract.image_size
    return Observation(
        images={camera: np.zeros((side, side, 3), np.uint8) for camera in contract.cameras},
        state=space.middle_state(),
        instruction="hold still.",
        robot=robot,
        seed=0,
    )
