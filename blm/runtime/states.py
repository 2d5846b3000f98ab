"""Inputs, outputs and states of the supervisor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from blm.runtime.arm import Reading
from blm.runtime.timeline import ChunkReply, ChunkRequest
from blm.types import FloatArray, PolicyContract


class State(StrEnum):
    """States of the control loop."""

    CHECKING = "checking"
    """No commands until the start check has passed and the first chunk has arrived."""
    RUNNING = "running"
    """Commands follow the current chunk."""
    HOLDING = "holding"
    """Commands brake to rest, then repeat the last command."""
    STOPPED = "stopped"
    """No commands any more."""


@dataclass
class RunReport:
    """Counts and result of a run."""

    state: State = State.CHECKING
    kind: str = ""
    """Reason of the end in one word: 'finished' or one of the stops in docs/robot.md."""
    reason: str = ""
    """Reason of the end as a sentence."""
    steps: int = 0
    """Number of commands sent."""
    chunks: int = 0
    held: int = 0
    """Number of commands that held the arm."""
    clamped: int = 0
    """Number of commands further from the policy's target than `Safety.clamp_error`."""
    unread: int = 0
    """Number of failed observations."""
    unsent: int = 0
    """Number of failed commands."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> number of dropped replies."""
    reconnections: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    """Time from each request to its reply [ms]."""


@dataclass(frozen=True)
class ReplyLate:
    """The server missed the deadline of this request."""

    number: int


@dataclass(frozen=True)
class ReplyMalformed:
    """The reply was not a valid chunk for this robot."""

    error: str


@dataclass(frozen=True)
class PolicyLost:
    """The policy failed or the connection is lost; the link reconnects."""

    error: str


@dataclass(frozen=True)
class PolicyReconnected:
    """The link has reconnected to the policy."""

    contract: PolicyContract


PolicyEvent = ChunkReply | ReplyLate | ReplyMalformed | PolicyLost | PolicyReconnected
StopReason = tuple[str, str]
"""The kind of a stop in one word, and its explanation."""


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """Inputs of one step of the supervisor."""

    now: float
    """Monotonic time [s]."""
    reading: Reading | None = None
    """A new observation of the arm."""
    read_error: str | None = None
    """Why the last observation failed."""
    events: Sequence[PolicyEvent] = ()
    stop: StopReason | None = None
    """A request to stop, from a signal, the e-stop or the watchdog."""
    can_send: bool = True
    """False while the previous command is still being sent."""
    can_ask: bool = True
    """False while the policy is busy or disconnected."""


@dataclass(frozen=True)
class Decision:
    """Output of one step: the command to send, if any, and the request for the policy, if any."""

    state: State
    command: FloatArray | None = None
    request: ChunkRequest | None = None
