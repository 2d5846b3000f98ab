"""The policy's side of the loop: requests for chunks, replies, and giving up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from blm.runtime.arm import Reading
from blm.runtime.limits import ArmLimits, Safety
from blm.runtime.log import RunLog
from blm.runtime.monitors import RepeatMonitor
from blm.runtime.states import PolicyEvent, PolicyLost, ReplyLate, ReplyMalformed, RunReport, StopReason
from blm.runtime.timeline import ChunkReply, ChunkRequest, ChunkTimeline, TrackingTarget
from blm.types import Observation, PolicyContract, decision_seed


class PolicySession:
    """Requests chunks, one at a time, and executes each of them while it is fresh."""

    def __init__(
        self,
        limits: ArmLimits,
        contract: PolicyContract,
        instruction: str,
        *,
        safety: Safety,
        report: RunReport,
        log: RunLog,
        seed: int,
    ) -> None:
        """Raises ContractError if the policy and the robot do not match."""
        limits.check_contract(contract, accept_wider=safety.accept_wider_limits)
        self.limits, self.contract, self.instruction, self.safety = limits, contract, instruction, safety
        self.report, self.log, self.seed = report, log, seed
        self.stop: StopReason | None = None
        self.lost = ""
        """Why the policy is disconnected; empty while it is connected."""
        self._timeline = ChunkTimeline(limits.rate_hz, contract.horizon, limits.dim, safety.deadline_s)
        self._repeats = RepeatMonitor(safety.repeat_s, safety.moving)
        self._numbers = 0

    def target(self, now: float) -> TrackingTarget | None:
        """Return the target of the current chunk, or None."""
        return self._timeline.target(now)

    def receive(self, events: Sequence[PolicyEvent], now: float) -> None:
        """Process the events of the policy and of the link to it."""
        for event in events:
            if isinstance(event, ChunkReply):
                self._take(event, now)
                continue
            self._timeline.give_up()
            if isinstance(event, ReplyLate):
                self._timeline.dropped["late"] += 1
                self.log.write("reply dropped", now, reason=f"late: the server gave up {event.number}")
            elif isinstance(event, ReplyMalformed):
                self._timeline.dropped["malformed"] += 1
                self._timeline.malformed += 1
                self._judge_malformed(event.error, now)
            elif isinstance(event, PolicyLost):
                self.lost = event.error or "the policy is lost"
                self.log.write("policy lost", now, error=event.error)
            else:
                self.lost = ""
                self.report.reconnections += 1
                self.log.write("policy found", now)
                if event.contract != self.contract:
                    self._stop("contract", "after the reconnection, the server has another policy")
        self.report.dropped = dict(self._timeline.dropped)

    def request(self, reading: Reading, now: float) -> ChunkRequest | None:
        """Return the next request if one is due, or None.

        It is due early enough for the reply to arrive when `execute` actions of the current chunk
        are over (real-time chunking: the policy receives the remaining actions, and how many of
        them will be executed before its reply).
        """
        timeline, lead = self._timeline, self._lead()
        if timeline.pending is not None:
            return None
        if timeline.target(now) is not None and timeline.age(now) < self.contract.execute - lead - 1e-6:
            return None
        left = timeline.left(reading.observed_at)
        self._numbers += 1
        observation = Observation(
            images=reading.images,
            state=reading.state.astype(np.float32),
            instruction=self.instruction,
            robot=self.limits.robot,
            seed=decision_seed(self.seed, self._numbers),
            chunk=None if left is None else left.astype(np.float32),
            inference_delay=0 if left is None else min(lead, len(left)),
        )
        timeline.pending = ChunkRequest(
            number=self._numbers, observed_at=reading.observed_at, asked_at=now, observation=observation
        )
        return timeline.pending

    def _take(self, reply: ChunkReply, now: float) -> None:
        timeline, asked = self._timeline, self._timeline.pending
        if why := timeline.receive(reply, now):
            self._judge_malformed(why, now)
            return
        assert asked is not None and timeline.chunk is not None
        self.report.chunks += 1
        self.report.latencies_ms.append(1000 * (now - asked.asked_at))
        state = np.asarray(asked.observation.state, np.float64)
        if self._repeats.add(asked.observed_at, state, timeline.chunk):
            self._stop("policy", f"it repeated the same chunk for {self.safety.repeat_s} s of motion")

    def _judge_malformed(self, why: str, now: float) -> None:
        self.log.write("reply dropped", now, reason=why)
        if self._timeline.malformed >= self.safety.bad_replies:
            self._stop("policy", f"{self._timeline.malformed} malformed replies in a row; the last: {why}")

    def _lead(self) -> int:
        """Return the expected inference delay: that of the last reply [control periods]."""
        last_s = self.report.latencies_ms[-1] / 1000 if self.report.latencies_ms else 0.0
        most = max(1, self.contract.execute - 1)
        return min(max(1, math.ceil(last_s * self.limits.rate_hz - 1e-6)), most)

    def _stop(self, kind: str, reason: str) -> None:
        self.stop = self.stop or (kind, reason)
