"""Timed action chunks: which reply belongs to which request, how old it is, and what it wants now.

Action i of a chunk is for the time of its observation plus i control periods. A reply is therefore trimmed by
its real age on the robot's monotonic clock; between two actions the target is interpolated.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from blm.types import ContractError, FloatArray, Observation

HUGE = 1e6
"""Wanted positions are cut off here, so that their differences stay finite; every limit is far below."""
ROUNDING = 1e-6
"""Control periods by which an age may be wrong."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question to the policy."""

    number: int
    """1, 2, .. within a run; sent along, and returned by servers of ours."""
    observed_at: float
    """When the observation was taken, on the robot's clock [s]; returned too."""
    asked_at: float
    observation: Observation


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back. `number` and `observed_at` are the reply's own, so that they can be checked."""

    number: Any
    observed_at: Any
    actions: Any


@dataclass(frozen=True)
class Target:
    """What a chunk wants of the next command."""

    wanted: FloatArray
    """[D]"""
    ahead: FloatArray
    """[D] how far it moves within one control period from then on."""


def check_actions(actions: Any, horizon: int, dim: int) -> FloatArray:
    """Return a chunk as float64 [H, dim], 1 <= H <= horizon. Raises ContractError for anything else."""
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


class Timeline:
    """The chunk in progress and the request that is under way. All times are on one monotonic clock."""

    def __init__(self, rate_hz: float, horizon: int, dim: int, deadline_s: float) -> None:
        self.rate_hz, self.horizon, self.dim, self.deadline_s = rate_hz, horizon, dim, deadline_s
        self.chunk: FloatArray | None = None
        self.observed_at = 0.0
        self.dropped: Counter[str] = Counter()
        """Why replies were not used -> how many."""
        self.malformed = 0
        """Malformed replies since the last good one."""
        self.pending: Request | None = None
        """The request under way."""

    def give_up(self) -> None:
        """Forget the request under way: its reply, should it still come, is nobody's."""
        self.pending = None

    def receive(self, reply: Reply, now: float) -> str | None:
        """Take a reply as the chunk in progress; else return why it was dropped."""
        reason = self._receive(reply, now)
        if reason is not None:
            self.dropped[reason.split(":")[0]] += 1
        return reason

    def _receive(self, reply: Reply, now: float) -> str | None:
        request = self.pending
        if request is None or not _same(reply.number, request.number):
            return f"not asked for: reply {str(reply.number)[:40]}"
        self.pending = None  # a second reply with this number is a duplicate
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
        """Control periods since the observation of the chunk in progress."""
        return (now - self.observed_at) * self.rate_hz

    def target(self, now: float) -> Target | None:
        """Return what the chunk in progress wants now; None without one, and when it is over."""
        if self.chunk is None:
            return None
        age = self.age(now)
        if not 0 <= age < len(self.chunk) - ROUNDING:
            self.chunk = None
            return None
        wanted, then = self._at(age), self._at(age + 1)
        return Target(wanted, then - wanted)

    def left(self, now: float) -> FloatArray | None:
        """Return the actions [P, D] still to come of the chunk in progress, the first of them for `now`."""
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
