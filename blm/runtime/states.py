"""What goes into and comes out of the supervisor's step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from blm.runtime.arm import Reading
from blm.runtime.chunks import Reply, Request
from blm.types import FloatArray, PolicyContract


class State(StrEnum):
    """CHECKING: nothing is sent until arm, cameras and first chunk are good. RUNNING: commands follow the
    chunk. HOLDING: commands come to rest, then repeat the last one. STOPPED: nothing is sent any more."""

    CHECKING = "checking"
    RUNNING = "running"
    HOLDING = "holding"
    STOPPED = "stopped"


@dataclass
class Report:
    """What happened in a run."""

    state: State = State.CHECKING
    kind: str = ""
    """Why it ended, in one word: 'finished' or one of the stops in docs/robot.md."""
    reason: str = ""
    steps: int = 0
    """Commands sent."""
    chunks: int = 0
    held: int = 0
    """Commands that held the arm."""
    clamped: int = 0
    """Commands far from what the policy wanted (`Safety.clamp_error`)."""
    unread: int = 0
    """Observations that failed."""
    unsent: int = 0
    """Commands that failed."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Replies that were not used, by reason."""
    reconnections: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    """From a request to its reply."""


@dataclass(frozen=True)
class Late:
    """The server said that it could not reply to this request in time."""

    number: int


@dataclass(frozen=True)
class Malformed:
    """The reply was no chunk for this robot."""

    error: str


@dataclass(frozen=True)
class Lost:
    """The policy failed or its connection is lost; the link tries again."""

    error: str


@dataclass(frozen=True)
class Found:
    """The policy is back."""

    contract: PolicyContract


Event = Reply | Late | Malformed | Lost | Found
Stop = tuple[str, str]
"""Kind, in one word, and reason."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What came in since the last step."""

    now: float
    """Monotonic time [s]."""
    reading: Reading | None = None
    """A new observation of the arm."""
    read_error: str | None = None
    """Why the last observation failed."""
    events: Sequence[Event] = ()
    stop: Stop | None = None
    """Someone wants the arm to stop."""
    can_send: bool = True
    """False while the command before is still being sent."""
    can_ask: bool = True
    """False while the policy is busy or lost."""


@dataclass(frozen=True)
class Decision:
    """What to do now: send the command, if there is one, and ask the policy, if there is a request."""

    state: State
    command: FloatArray | None = None
    request: Request | None = None
