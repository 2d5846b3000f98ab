"""Monitors of the running arm: start check, following error, cameras, clamping, repeated chunks.

They read no clock: every time they receive is on the loop's monotonic clock.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque

import numpy as np

from blm.runtime.arm import Reading
from blm.runtime.limits import ArmLimits, Safety
from blm.types import FloatArray, ImageArray

KNOWN_PICTURES = 32
"""Number of recent images with which a new one is compared: some drivers replay old buffers."""
CLAMPED_SHARE = 0.9
"""Share of clamped commands from which clamping counts as sustained."""


class StartCheck:
    """Whether the arm may start: consecutive valid readings, inside the limits and at rest."""

    def __init__(self, limits: ArmLimits, safety: Safety) -> None:
        self.limits, self.safety = limits, safety
        self._states: deque[FloatArray] = deque(maxlen=safety.check_readings)

    def add(self, state: FloatArray) -> None:
        self._states.append(state)

    def clear(self) -> None:
        """Start again after a failed reading."""
        self._states.clear()

    def problem(self) -> str | None:
        """Return why the arm may not start now; None if it may."""
        if len(self._states) < self.safety.check_readings:
            return f"{len(self._states)} of {self.safety.check_readings} good readings"
        if why := outside_limits(self._states[-1], self.limits, self.safety):
            return why
        moved = np.ptp(np.stack(self._states), axis=0)[:-1]
        if moved.max() > self.safety.still:
            name = self.limits.names[int(moved.argmax())]
            return f"the arm moves: {name} by {moved.max():.3f} rad within {len(self._states)} readings"
        return None


def outside_limits(state: FloatArray, limits: ArmLimits, safety: Safety) -> str | None:
    """Return which value is outside the limits by more than the tolerance, or None.

    The text has a hint if a unit seems to be wrong.
    """
    excess = limits.outside(state) - np.append(
        np.full(limits.dim - 1, safety.start_tolerance), safety.gripper_tolerance
    )
    worst = int(excess.argmax())
    if excess[worst] <= 0:
        return None
    joints, gripper, hints = np.append(np.radians(state[:-1]), 0.0), state[-1], ""
    if (excess[:-1] > 0).any() and not (limits.outside(joints)[:-1] > safety.start_tolerance).any():
        hints += "; these look like degrees: Units(joint=np.pi / 180)"
    if excess[-1] > 0 and 1 < gripper <= 100:
        hints += "; the gripper looks like 0..100: Units(gripper=0.01)"
    return (
        f"{limits.names[worst]} is measured at {state[worst]:.4g}, outside "
        f"{limits.low[worst]:.4g}..{limits.high[worst]:.4g}{hints}"
    )


class ConditionTimer:
    """Measures for how long a condition has held without interruption."""

    def __init__(self) -> None:
        self._since: float | None = None

    def update(self, holds: bool, now: float) -> float:
        """Return how long the condition has held [s]; 0 if it does not hold."""
        if not holds:
            self._since = None
            return 0.0
        if self._since is None:
            self._since = now
        return now - self._since


class FollowingMonitor:
    """Following error: how far the measured joints are from the recent commands."""

    def __init__(self, lag_s: float) -> None:
        self.lag_s = lag_s
        self._commands: deque[tuple[float, FloatArray]] = deque()

    def sent(self, now: float, command: FloatArray) -> None:
        self._commands.append((now, command))
        while len(self._commands) > 1 and self._commands[1][0] < now - 2 * self.lag_s:
            self._commands.popleft()

    def error(self, reading: Reading) -> tuple[float, int]:
        """Return the largest following error [rad] and the index of its joint, without the gripper.

        It is the distance of a joint from the range of the commands that were active during `lag_s`
        before the reading.
        """
        begin, end = reading.observed_at - self.lag_s, reading.observed_at
        commands = list(self._commands)
        recent = [
            command
            for i, (at, command) in enumerate(commands)
            if at <= end and (i + 1 == len(commands) or commands[i + 1][0] >= begin)
        ]
        if not recent:
            return 0.0, 0
        band = np.stack(recent)[:, :-1]
        joints = reading.state[:-1]
        away = np.maximum(np.maximum(band.min(0) - joints, joints - band.max(0)), 0.0)
        return float(away.max()), int(away.argmax())


class CameraMonitor:
    """Detects cameras whose image stays the same although the arm moves."""

    def __init__(self, frozen_s: float, moving: float) -> None:
        self.frozen_s, self.moving = frozen_s, moving
        self._known: dict[str, deque[bytes]] = {}
        self._changed: dict[str, Reading] = {}

    def add(self, reading: Reading) -> str | None:
        """Add a reading; return the fault of a camera, or None."""
        for camera, image in reading.images.items():
            known = self._known.setdefault(camera, deque(maxlen=KNOWN_PICTURES))
            name = _hash(image)
            if name not in known:
                known.append(name)
                self._changed[camera] = reading
                continue
            since = self._changed[camera]
            moved = float(np.abs(reading.state - since.state)[:-1].max())
            age = reading.observed_at - since.observed_at
            if age > self.frozen_s and moved > self.moving:
                return f"camera '{camera}' has shown the same image for {age:.2f} s while the arm moved"
        return None


class ClampMonitor:
    """Whether nearly all commands of the last `clamp_s` differ from the policy's targets."""

    def __init__(self, safety: Safety, rate_hz: float) -> None:
        self.error = safety.clamp_error
        self._clamped: deque[bool] = deque(maxlen=max(1, round(safety.clamp_s * rate_hz)))

    def add(self, wanted: FloatArray, command: FloatArray) -> bool:
        """Add a command and its target; return whether the command was clamped."""
        clamped = bool(np.abs(wanted - command).max() > self.error)
        self._clamped.append(clamped)
        return clamped

    @property
    def sustained(self) -> bool:
        full = len(self._clamped) == self._clamped.maxlen
        return full and sum(self._clamped) >= CLAMPED_SHARE * len(self._clamped)


class RepeatMonitor:
    """Detects a policy that returns the same chunk for every observation."""

    def __init__(self, repeat_s: float, moving: float) -> None:
        self.repeat_s, self.moving = repeat_s, moving
        self._chunk = b""
        self._first: tuple[float, FloatArray] = (math.inf, np.zeros(0))
        self._moved = 0.0

    def add(self, observed_at: float, state: FloatArray, chunk: FloatArray) -> bool:
        """Add a valid chunk with time and state of its observation; return whether it repeats."""
        if chunk.tobytes() != self._chunk:
            self._chunk, self._first, self._moved = chunk.tobytes(), (observed_at, state), 0.0
            return False
        self._moved = max(self._moved, float(np.abs(state - self._first[1])[:-1].max()))
        return observed_at - self._first[0] > self.repeat_s and self._moved > self.moving


def _hash(image: ImageArray) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()
