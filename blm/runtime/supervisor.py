"""The control loop as a pure state machine.

Each step maps (time, observation, replies) to (state, command, request). There are no threads, no
clock and no input or output, so every path can be tested. The states are those of `states.State`.
Only this class creates commands, and all of them pass the `CommandLimiter`.
"""

from __future__ import annotations

import math

from blm.runtime.command_limiter import CommandLimiter
from blm.runtime.health import ArmHealth
from blm.runtime.limits import ArmLimits, Safety
from blm.runtime.log import RunLog
from blm.runtime.monitors import ClampMonitor, ConditionTimer
from blm.runtime.policy_session import PolicySession
from blm.runtime.states import Decision, RunReport, State, StepInputs, StopReason
from blm.types import BlmError, FloatArray, PolicyContract

EARLY = 1e-6
"""Share of a control period by which a command may be early, because times are rounded."""


class Supervisor:
    """The state machine of one run. Send every command that `step` returns at once."""

    def __init__(
        self,
        limits: ArmLimits,
        contract: PolicyContract,
        instruction: str,
        *,
        safety: Safety | None = None,
        log: RunLog | None = None,
        seconds: float = math.inf,
        seed: int = 0,
    ) -> None:
        """`seconds`: how long to follow the policy, not counting holds, each of which lasts at most
        `Safety.max_hold_s`. `seed`: seed of the policy's noise.

        Raises ContractError if policy and robot do not match, and BlmError for timeouts shorter
        than two control periods.
        """
        self.limits, self.seconds = limits, seconds
        self.safety, self.log, self.report = safety or Safety(), log or RunLog(), RunReport()
        if not seconds > 0:
            raise BlmError(f"seconds must be positive, got {seconds}")
        if min(self.safety.observation_hold_s, self.safety.stall_s) < 2 * limits.period:
            raise BlmError(
                "Safety: observation_hold_s and stall_s "
                f"must be two control periods ({2 * limits.period} s) or more: {self.safety}"
            )
        self.limiter = CommandLimiter(limits)
        self.health = ArmHealth(limits, self.safety, self.report, self.log)
        self.session = PolicySession(
            limits,
            contract,
            instruction,
            safety=self.safety,
            report=self.report,
            log=self.log,
            seed=seed,
        )
        self._clamps = ClampMonitor(self.safety, limits.rate_hz)
        self._not_ready = ConditionTimer()
        self._no_chunk = ConditionTimer()
        self._send_failing = ConditionTimer()
        self._stopping: StopReason | None = None
        self._send_error: str | None = None
        self._resting = False
        self._now: float | None = None
        self._followed_s = self._held_since = self._stopping_since = 0.0
        self._sent_at = -math.inf

    @property
    def state(self) -> State:
        return self.report.state

    @property
    def stopping(self) -> bool:
        """Whether the arm is braking for a stop."""
        return self._stopping is not None

    @property
    def due(self) -> float:
        """The earliest time of the next command [s]."""
        return self._sent_at + self.limits.period

    def step(self, inputs: StepInputs) -> Decision:
        """Process the inputs; return at most one command per control period, and a request."""
        if self.state is State.STOPPED or not self._tick(inputs.now):
            return Decision(State.STOPPED)
        now = inputs.now
        if inputs.stop is not None:
            self.stop(*inputs.stop)
        if self._stopping is None:
            self.health.observe(inputs.reading, inputs.read_error, now)
            self.session.receive(inputs.events, now)
            for reason in (self.health.stop, self.session.stop):
                if reason is not None:
                    self.stop(*reason)
        if self._stopping is None and self.state is State.CHECKING:
            self._consider_start(now)
        if self._stopping is not None and self._at_rest(now):
            self._end(now)
            return Decision(State.STOPPED)
        command = self._command(now, inputs.can_send) if self.limiter.started else None
        request = None
        may_ask = self._stopping is None and inputs.can_ask and inputs.reading is not None
        if may_ask and inputs.reading is self.health.reading and inputs.reading is not None:
            ready = self.state is not State.CHECKING or self.health.problem() is None
            request = self.session.request(inputs.reading, now) if ready else None
        return Decision(self.state, command, request)

    def stop(self, kind: str, reason: str) -> None:
        """Brake to rest, then stop. The first reason counts."""
        if self._stopping is not None or self.state is State.STOPPED:
            return
        now = self._now or 0.0
        self._stopping, self._stopping_since = (kind, reason), now
        self.log.write("stopping", now, kind=kind, reason=reason)
        if self.limiter.started:
            self._enter(State.HOLDING, now, reason)

    def abandon(self, kind: str, reason: str) -> None:
        """Stop at once, without braking, when the clock or the arm is not reliable any more."""
        self.stop(kind, reason)
        self._end(self._now or 0.0)

    def delivered(self, at: float, error: str | None = None) -> None:
        """Record the time at which the last command was sent to the arm [s].

        `error` is the reason why the arm may not have received it. A failed command also counts as
        sent: the next one is limited relative to it.
        """
        self._sent_at, self._send_error = max(self._sent_at, at), error
        if error:
            self.report.unsent += 1
            self.log.write("send failed", at, error=error)
        if self._send_failing.update(bool(error), at) > self.safety.send_stop_s:
            self.stop("send", f"commands have failed for {self.safety.send_stop_s} s: {error}")

    def _tick(self, now: float) -> bool:
        """Record the time. Returns False if the clock is wrong, which ends the run."""
        before = self._now
        if not math.isfinite(now) or (before is not None and now < before):
            self.abandon("clock", f"the clock went from {before} to {now}; it must be monotonic")
            return False
        self._now = now
        if before is not None and now - before > self.safety.stall_s:
            self.stop("stalled", f"the loop did not run for {now - before:.2f} s")
        return True

    def _consider_start(self, now: float) -> None:
        """Enter RUNNING if the arm is at rest in its limits and the first chunk is there."""
        problem = self.health.problem()
        if self._not_ready.update(problem is not None, now) > self.safety.start_s:
            self.stop("start", problem or "")
        if problem is not None:
            return
        reading, absent = self.health.reading, self.session.target(now) is None
        if self._no_chunk.update(absent, now) > self.safety.max_hold_s:
            self.stop("policy", self.session.lost or f"no usable chunk within {self.safety.max_hold_s} s")
        if absent or reading is None or self.health.hold(now):
            return
        self.limiter.start(reading.state)
        self.health.sent(reading.observed_at, self.limiter.position)
        self._enter(State.RUNNING, now, "the first chunk has arrived")

    def _at_rest(self, now: float) -> bool:
        """Whether a stop is complete: no command was ever sent, or the last command equals the one
        before it and has been delivered. A failed command is repeated for at most `send_stop_s`."""
        if not self.limiter.started:
            return True
        if not self._resting:
            return False
        return not self._send_error or now - self._stopping_since > self.safety.send_stop_s

    def _command(self, now: float, can_send: bool) -> FloatArray | None:
        if self._followed_s >= self.seconds - 1e-9:
            self.stop("finished", f"{self.seconds} s are over")
        if not can_send:
            self._blocked(now)
            return None
        if now < self.due - EARLY * self.limits.period:
            return None
        target, hold = self.session.target(now), self._reason_to_hold(now)
        self._settle(hold, now)
        if hold is not None or target is None:
            command = self.limiter.brake()
            self.report.held += 1
        else:
            command = self.limiter.track(target.wanted, target.ahead)
            self.report.clamped += self._clamps.add(target.wanted, command)
            if self._clamps.sustained:
                reason = f"the policy's targets have exceeded the limits for {self.safety.clamp_s} s"
                self.stop("clamping", reason)
                command = self.limiter.brake()
        return self._commit(command, now)

    def _blocked(self, now: float) -> None:
        """send_action has not returned: stop without braking if that takes too long."""
        if now - self.due > self.safety.send_stop_s:
            self.stop("send", f"send_action has not returned for {now - self._sent_at:.2f} s")
            self._end(now)

    def _reason_to_hold(self, now: float) -> str | None:
        if self._stopping is not None:
            return self._stopping[1]
        if self._send_error:
            return f"the last command failed: {self._send_error}"
        if why := self.health.hold(now):
            return why
        if self.session.target(now) is None:
            return self.session.lost or "no chunk for this time"
        return None

    def _settle(self, hold: str | None, now: float) -> None:
        """Enter HOLDING with a reason, RUNNING without; stop when a hold lasts too long."""
        if hold is None:
            self._enter(State.RUNNING, now, "")
            return
        self._enter(State.HOLDING, now, hold)
        if now - self._held_since > self.safety.max_hold_s:
            self.stop("patience", f"held for {self.safety.max_hold_s} s: {hold}")

    def _commit(self, command: FloatArray, now: float) -> FloatArray:
        elapsed = (now - self._sent_at) / self.limits.period
        elapsed = elapsed if math.isfinite(elapsed) else 1.0
        self.limiter.sent(command, elapsed)
        if self.state is State.RUNNING:
            self._followed_s += elapsed * self.limits.period
        self._sent_at = now
        self.health.sent(now, command)
        self.report.steps += 1
        self._resting = self._stopping is not None and self.limiter.still
        return command

    def _enter(self, state: State, now: float, why: str) -> None:
        if state is self.state:
            return
        if state is State.HOLDING:
            self._held_since = now
        self.report.state = state
        self.log.write("state", now, state=state.value, reason=why)

    def _end(self, now: float) -> None:
        if self.state is State.STOPPED:
            return
        self.report.kind, self.report.reason = self._stopping or ("stopped", "")
        self.report.state = State.STOPPED
        held = self.limiter.position.tolist() if self.limiter.started else None
        self.log.write("stopped", now, kind=self.report.kind, reason=self.report.reason, held=held)
