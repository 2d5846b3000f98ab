"""Health of the arm, judged from its observations: may it start, must it hold, must it stop?"""

from __future__ import annotations

import numpy as np

from blm.runtime.arm import Reading
from blm.runtime.limits import ArmLimits, Safety
from blm.runtime.log import RunLog
from blm.runtime.monitors import CameraMonitor, ConditionTimer, FollowingMonitor, StartCheck, outside_limits
from blm.runtime.states import RunReport, StopReason
from blm.runtime.timeline import HUGE
from blm.types import FloatArray


class ArmHealth:
    """Checks observations: their age, cameras, following error and joint limits.

    `problem`, `hold` and `stop` give the reason not to start, to hold, and to stop.
    """

    def __init__(self, limits: ArmLimits, safety: Safety, report: RunReport, log: RunLog) -> None:
        self.limits, self.safety, self.report, self.log = limits, safety, report, log
        self.reading: Reading | None = None
        """The last valid observation."""
        self.stop: StopReason | None = None
        self._check = StartCheck(limits, safety)
        self._cameras = CameraMonitor(safety.frozen_s, safety.moving)
        self._following = FollowingMonitor(safety.following_lag_s)
        self._away, self._outside = ConditionTimer(), ConditionTimer()
        self._moving = False
        self._first: float | None = None
        self._error = self._fault = ""

    def observe(self, reading: Reading | None, error: str | None, now: float) -> None:
        """Process a new observation, or the error of one that failed."""
        if self._first is None:
            self._first = now
        if reading is not None and (why := self._unusable(reading, now)):
            reading, error = None, why
        if error is not None:
            self.report.unread += 1
            self._check.clear()
            if error != self._error:
                self.log.write("no observation", now, error=error)
            self._error = error
        if reading is not None:
            self.reading, self._error = reading, ""
            self._check.add(reading.state)
            self._judge(reading)
        if self._moving and (age := self.age(now)) > self.safety.observation_stop_s:
            why = self._error or "get_observation has not returned"
            self._stop("observation", f"there was no observation for {age:.2f} s: {why}")

    def sent(self, now: float, command: FloatArray) -> None:
        """Record a command; the first one is the measured position."""
        self._moving = True
        self._following.sent(now, command)

    def age(self, now: float) -> float:
        """Return the age of the last valid observation [s]."""
        return now - (self.reading.observed_at if self.reading else self._first or 0.0)

    def problem(self) -> str | None:
        """Return why the arm may not start; None if it may."""
        problem = self._check.problem()
        return problem and (self._error or problem)

    def hold(self, now: float) -> str | None:
        """Return why the arm must hold its position now; None if it need not."""
        if (age := self.age(now)) > self.safety.observation_hold_s:
            return f"no observation for {age:.2f} s: {self._error or 'get_observation has not returned'}"
        return self._fault or None

    def _unusable(self, reading: Reading, now: float) -> str | None:
        age = now - reading.observed_at
        if not -1e-6 <= age <= self.safety.observation_hold_s:
            return f"an observation arrived {age:.2f} s after its start"
        if reading.state.shape != (self.limits.dim,) or not (np.abs(reading.state) < HUGE).all():
            return f"the state is {reading.state}; needed: {self.limits.dim} finite numbers"
        if self.reading is not None and reading.observed_at <= self.reading.observed_at:
            return "an observation arrived twice"
        return None

    def _judge(self, reading: Reading) -> None:
        """Check cameras, following error and joint limits.

        A fault holds the arm, and stops it if it lasts.
        """
        self._fault = ""
        if why := self._cameras.add(reading):
            self._stop("camera", why)
        if not self._moving:
            return
        safe, (error, joint) = self.safety, self._following.error(reading)
        away = self._away.update(error > safe.following_error, reading.observed_at)
        if error > safe.following_error:
            name = self.limits.names[joint]
            self._fault = f"{name} has a following error of {error:.2f} rad: blocked, or too slow"
        outside = outside_limits(reading.state, self.limits, safe)
        gone = self._outside.update(outside is not None, reading.observed_at)
        self._fault = self._fault or outside or ""
        if max(away, gone) > safe.following_s:
            self._stop("following", self._fault)

    def _stop(self, kind: str, reason: str) -> None:
        self.stop = self.stop or (kind, reason)
