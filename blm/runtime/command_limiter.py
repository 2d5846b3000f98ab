"""Limit commands in position, velocity and acceleration.

Discrete time, per joint. Let x be the last command, v its step (x minus the command before it), and
V, A the largest step and the largest change of a step: V = velocity / rate, A = acceleration /
rate^2. From step v > 0, maximal braking covers the distance D(v) = (v - A) + (v - 2A) + ..
(positive terms only). Invariant:

    x + D(v) <= high  if v >= 0,     x - D(-v) >= low  if v <= 0,     |v| <= V.

The next step v' is chosen with |v' - v| <= A, |v'| <= V and x + v' + D(v') <= high (likewise for
low), which is the invariant again. Such a v' always exists: for v > A it is v - A, because v - A +
D(v - A) = D(v); else 0. So every state that the limiter can reach has a next command within all
limits. In continuous time this is the rule v <= sqrt(2 a d), with d the distance to the limit.

At a start outside the limits v = 0, and the distance to the limit counts as 0, so the joint can
only stay or move back inside.
"""

from __future__ import annotations

import numpy as np

from blm.runtime.limits import ArmLimits
from blm.types import FloatArray

MARGIN = 1e-6
"""Relative reduction of V and A, so that no command exceeds the stated limits by rounding."""


def largest_step(distance: FloatArray, change: FloatArray) -> FloatArray:
    """Return the largest step v from which braking ends within `distance` >= 0.

    Braking reduces the step by `change` each time. It solves v + D(v) = distance, where n = ceil(v
    / A) - 1 braking steps cover v + D(v) = (n + 1) v - A n (n + 1) / 2.
    """
    n = np.maximum(np.ceil((np.sqrt(1 + 8 * distance / change) - 3) / 2), 0.0)
    return distance / (n + 1) + change * n / 2


class CommandLimiter:
    """Turns target positions into commands within the limits.

    Call `start` once, then for each command `track` or `brake`, and `sent`.
    """

    def __init__(self, limits: ArmLimits) -> None:
        self.low, self.high = np.array(limits.low), np.array(limits.high)
        self._most = np.array(limits.velocity) * limits.period * (1 - MARGIN)
        self._change = np.array(limits.acceleration) * limits.period**2 * (1 - MARGIN)
        self._position: FloatArray | None = None
        self._step = np.zeros(limits.dim)

    @property
    def started(self) -> bool:
        return self._position is not None

    @property
    def position(self) -> FloatArray:
        """The last command sent [D]; before the first one, the measured state."""
        assert self._position is not None, "call start first"
        return self._position

    @property
    def still(self) -> bool:
        """Whether the last command equals the one before it."""
        return not self._step.any()

    def start(self, measured: FloatArray) -> None:
        """Start at a finite measured state [D], at rest."""
        assert np.isfinite(measured).all(), measured
        self._position, self._step = np.array(measured, np.float64), np.zeros(len(self.low))

    def track(self, wanted: FloatArray, ahead: FloatArray) -> FloatArray:
        """Return the command [D] towards the target `wanted`.

        The target moves by `ahead` until the next command. A trajectory within the limits is
        followed exactly. Otherwise the command moves as fast as allowed without overshooting:
        relative to the moving target it brakes in time. Both must be finite.
        """
        then = np.clip(wanted + ahead, self.low, self.high)
        wanted = np.clip(wanted, self.low, self.high)
        ahead = np.clip(then - wanted, -self._most, self._most)
        gap = wanted - ahead - self.position
        return self._limited(ahead + np.copysign(largest_step(np.abs(gap), self._change), gap))

    def brake(self) -> FloatArray:
        """Return the command [D] that brakes as fast as allowed; at rest, the last one."""
        return self._limited(self._braked())

    def sent(self, command: FloatArray, elapsed_periods: float) -> None:
        """Record a command and the control periods (>= 1) since the one before it.

        After a gap the arm has slowed down by itself, so its speed must rise again within the
        limit.
        """
        self._step = (command - self.position) * min(1.0, 1 / max(elapsed_periods, 1e-9))
        self._position = command

    def _braked(self) -> FloatArray:
        return self._step - np.clip(self._step, -self._change, self._change)

    def _limited(self, step: FloatArray) -> FloatArray:
        x, v, braked = self.position, self._step, self._braked()
        up = largest_step(np.maximum(self.high - x, 0.0), self._change)
        down = largest_step(np.maximum(x - self.low, 0.0), self._change)
        most = np.minimum(np.minimum(v + self._change, self._most), up)
        least = np.maximum(np.maximum(v - self._change, -self._most), -down)
        # In exact arithmetic braking is always allowed; rounding must not produce an empty interval.
        step = np.clip(step, np.minimum(least, braked), np.maximum(most, braked))
        return np.clip(x + step, np.minimum(self.low, x), np.maximum(self.high, x))
