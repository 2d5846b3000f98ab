"""Action chunks on the robot's clock: their age, the current target, requests and replies.

Action i of a chunk is meant for the time of its observation plus i control periods. The target is
therefore looked up by the chunk's real age on the robot's monotonic clock, and interpolated between
two actions.

This differs from `blm.chunks.ChunkExecutor`, which counts simulated control steps: a real loop has
no whole steps, its replies arrive at any time, and a chunk that is too old must not be executed at
all.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from blm.types import ContractError, FloatArray, Observation

HUGE = 1e6
"""Magnitude to which targets are clipped, so that differences are finite. Limits are lower."""
ROUNDING = 1e-6
"""Tolerance of an age for rounding errors [control periods]."""


@dataclass(frozen=True, kw_only=True)
class ChunkRequest:
    """A request for an action chunk."""

    number: int
    """1, 2, .. within a run. It is sent with the request, and servers of this package echo it."""
    observed_at: float
    """Time of the observation on the robot's clock [s]; echoed as well."""
    asked_at: float
    """Time of the request [s]."""
    observation: Observation


@dataclass(frozen=True, kw_only=True)
class ChunkReply:
    """A reply, unchecked. `number` and `observed_at` are those of the reply, not of the request."""

    number: Any
    observed_at: Any
    actions: Any


@dataclass(frozen=True)
class TrackingTarget:
    """The chunk's target for the next command."""

    wanted: FloatArray
    """[D] target position."""
    ahead: FloatArray
    """[D] how far the target moves within the next control period."""


def check_actions(actions: Any, horizon: int, dim: int) -> FloatArray:
    """Return a chunk as finite float64 [H, dim], 1 <= H <= horizon.

    Raises ContractError for any other value.
    """
    try:
        array = np.asarray(actions)
    except (TypeError, ValueError) as error:
        raise ContractError(f"the actions are not an array: {str(error)[:100]}") from error
    if array.dtype.kind not in "fiu" or array.ndim != 2 or array.shape[1] != dim:
        raise ContractError(f"actions are {array.dtype} {array.shape}; needed: numbers (1..{horizon}, {dim})")
    if not 1 <= len(array) <= horizon:
        raise ContractError(f"the chunk has {len(array)} actions; needed: 1..{horizon}")
    chunk = np.array(array, np.float64)
    if not np.isfinite(chunk).all():
        row, column = np.argwhere(~np.isfinite(chunk))[0]
        raise ContractError(f"action {row} is {chunk[row, column]} in dimension {column}; needed: finite")
    return np.clip(chunk, -HUGE, HUGE)


class ChunkTimeline:
    """The current chunk and the pending request. All times are on one monotonic clock."""

    def __init__(self, rate_hz: float, horizon: int, dim: int, deadline_s: float) -> None:
        self.rate_hz, self.horizon, self.dim, self.deadline_s = rate_hz, horizon, dim, deadline_s
        self.chunk: FloatArray | None = None
        self.observed_at = 0.0
        self.dropped: Counter[str] = Counter()
        """Reason -> number of replies that were dropped for it."""
        self.malformed = 0
        """Malformed replies since the last valid one."""
        self.pending: ChunkRequest | None = None
        """The request whose reply is awaited."""

    def give_up(self) -> None:
        """Forget the pending request; a reply to it that still arrives is dropped."""
        self.pending = None

    def receive(self, reply: ChunkReply, now: float) -> str | None:
        """Make a reply the current chunk; return None, or the reason why it was dropped."""
        reason = self._receive(reply, now)
        if reason is not None:
            self.dropped[reason.split(":")[0]] += 1
        return reason

    def _receive(self, reply: ChunkReply, now: float) -> str | None:
        request = self.pending
        if request is None or not _same(reply.number, request.number):
            return f"not asked for: reply {str(reply.number)[:40]}"
        self.pending = None  # any further reply with this number is a duplicate
        if not _same(reply.observed_at, request.observed_at):
            return f"of another observation: {str(reply.observed_at)[:40]}, not {request.observed_at}"
        try:
            actions = check_actions(reply.actions, self.horizon, self.dim)
        except ContractError as error:
            self.malformed += 1
            return f"malformed: {error}"
        self.malformed = 0
        if now - request.asked_at > self.deadline_s:
            return f"late: {now - request.asked_at:.2f} s after its request, allowed are {self.deadline_s} s"
        if (now - request.observed_at) * self.rate_hz > len(actions) - ROUNDING:
            return f"expired: its {len(actions)} actions were over when it came"
        self.chunk, self.observed_at = actions, request.observed_at
        return None

    def age(self, now: float) -> float:
        """Return the age of the current chunk, counted from its observation [control periods]."""
        return (now - self.observed_at) * self.rate_hz

    def target(self, now: float) -> TrackingTarget | None:
        """Return the target of the current chunk; None without one or after its end."""
        if self.chunk is None:
            return None
        age = self.age(now)
        if not 0 <= age < len(self.chunk) - ROUNDING:
            self.chunk = None
            return None
        wanted, then = self._at(age), self._at(age + 1)
        return TrackingTarget(wanted, then - wanted)

    def left(self, now: float) -> FloatArray | None:
        """Return the remaining actions [P, D] of the current chunk, the first of them for `now`."""
        if self.chunk is None or not 0 <= (age := self.age(now)) <= len(self.chunk) - 1:
            return None
        return np.stack([self._at(age + i) for i in range(int(len(self.chunk) - 1 - age) + 1)])

    def _at(self, age: float) -> FloatArray:
        assert self.chunk is not None
        last = len(self.chunk) - 1
        place = min(age, float(last))
        before = int(place)
        share = place - before
        return (1 - share) * self.chunk[before] + share * self.chunk[min(before + 1, last)]


def _same(theirs: Any, ours: float) -> bool:
    number = isinstance(theirs, int | float) and not isinstance(theirs, bool)
    return number and theirs == ours
