"""Simulated time for the robot loop: an arm, a policy, faults, and an independent check of commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blm.runtime import ArmLimits, RunReport, Safety, State
from blm.runtime.arm import Reading
from blm.runtime.states import PolicyEvent, StepInputs
from blm.runtime.supervisor import Supervisor
from blm.runtime.timeline import ChunkReply, ChunkRequest
from blm.types import ActionSpace, PolicyContract

SIDE, HORIZON, EXECUTE = 4, 8, 4
NAMES = ("joint1", "joint2", "joint3", "gripper")
LIMITS = ArmLimits(
    robot="panda",
    names=NAMES,
    low=(-2.0, -1.0, 0.1, 0.0),
    high=(2.0, 1.5, 0.9, 1.0),
    velocity=(1.5, 2.0, 3.0, 2.5),
    acceleration=(6.0, 10.0, 3.0, 50.0),
)
HOME = np.array([0.0, 0.2, 0.5, 1.0])


def contract(limits: ArmLimits = LIMITS, **changes: Any) -> PolicyContract:
    space: dict[str, Any] = {
        "robot": limits.robot,
        "names": limits.names,
        "units": ("rad",) * (limits.dim - 1) + ("opening",),
        "low": limits.low,
        "high": limits.high,
        "rate_hz": limits.rate_hz,
    }
    space |= {key: changes.pop(key) for key in list(changes) if key in {*space, "kind"}}
    sizes = {"image_size": SIDE, "horizon": HORIZON, "execute": EXECUTE, "rate_hz": limits.rate_hz}
    if "contract_rate_hz" in changes:
        sizes["rate_hz"] = changes.pop("contract_rate_hz")
    return PolicyContract(
        action_spaces={limits.robot: ActionSpace(**space)}, cameras=("base",), **(sizes | changes)
    )


def picture(number: int) -> np.ndarray:
    """A picture that differs from those of all other numbers."""
    return np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


@dataclass
class Checker:
    """Judges commands by the definition of the limits, without the limiter's own arithmetic."""

    limits: ArmLimits
    position: np.ndarray | None = None
    step: np.ndarray = field(default_factory=lambda: np.zeros(0))
    at: float | None = None
    commands: list[tuple[float, np.ndarray]] = field(default_factory=list)

    def check(self, now: float, command: np.ndarray, measured: np.ndarray) -> None:
        """`measured`: the last good state, from which the first command starts at rest."""
        limits, dt = self.limits, self.limits.period
        if self.position is None:
            self.position, self.step = measured, np.zeros(limits.dim)
        assert command.shape == (limits.dim,) and np.isfinite(command).all()
        low, high = np.minimum(limits.low, self.position), np.maximum(limits.high, self.position)
        assert (command >= low).all() and (command <= high).all(), (command, low, high)
        step, gap = command - self.position, dt if self.at is None else now - self.at
        assert gap >= dt * (1 - 1e-5), f"two commands within {gap} s"
        # positions are float64: a difference of two steps is exact to a few times their last bit
        rounding = 4 * np.spacing(np.maximum(np.abs(command), np.abs(self.position)))
        assert (np.abs(step) <= np.array(limits.velocity) * dt + rounding).all(), step / dt
        change = np.abs(step - self.step)
        assert (change <= np.array(limits.acceleration) * dt**2 + rounding).all(), change / dt**2
        # A late command moved the arm more slowly than its step says: the next one speeds up from there.
        self.position, self.at, self.step = command, now, step * min(1.0, dt / gap)
        self.commands.append((now, command))

    @property
    def still(self) -> bool:
        return not self.step.any()


class World:
    """Steps a supervisor in simulated time. Replace the hooks to make it hostile."""

    def __init__(
        self,
        policy: Callable[[ChunkRequest], Any],
        *,
        limits: ArmLimits = LIMITS,
        safety: Safety | None = None,
        seconds: float = 10.0,
        latency: float = 0.1,
        start: np.ndarray = HOME,
        promise: PolicyContract | None = None,
    ) -> None:
        self.policy, self.limits, self.latency = policy, limits, latency
        self.supervisor = Supervisor(
            limits, promise or contract(limits), "push", safety=safety, seconds=seconds
        )
        self.state, self.target, self.now = np.array(start, float), np.array(start, float), 0.0
        self.steps, self.inbox = 0, list[tuple[float, PolicyEvent]]()
        self.checker, self.measured = Checker(limits), np.array(start, float)
        self.requests: list[ChunkRequest] = []
        self.states: list[State] = []

    # hooks
    def read(self) -> tuple[Reading | None, str | None]:
        return Reading(
            observed_at=self.now, state=self.state.copy(), images={"base": picture(self.steps)}
        ), None

    def move(self) -> None:
        self.state = self.target.copy()

    def answer(self, request: ChunkRequest) -> list[tuple[float, PolicyEvent]]:
        actions = self.policy(request)
        reply = ChunkReply(number=request.number, observed_at=request.observed_at, actions=actions)
        return [(self.now + self.latency, reply)]

    def inputs(self) -> dict[str, Any]:
        return {}

    def deliver(self) -> str | None:
        return None

    def wait(self) -> float:
        return self.limits.period

    def step(self) -> None:
        reading, error = self.read()
        due = [event for at, event in self.inbox if at <= self.now + 1e-9]
        self.inbox = [(at, event) for at, event in self.inbox if at > self.now + 1e-9]
        fields = {"now": self.now, "reading": reading, "read_error": error, "events": due} | self.inputs()
        decision = self.supervisor.step(StepInputs(**fields))
        good = self.supervisor.health.reading
        if good is not None and self.checker.position is None:
            self.measured = good.state
        self.states.append(decision.state)
        if decision.command is not None:
            self.checker.check(self.now, decision.command, self.measured)
            self.target = decision.command
            self.supervisor.delivered(self.now, self.deliver())
        if decision.request is not None:
            self.requests.append(decision.request)
            self.inbox += self.answer(decision.request)
        self.move()
        self.steps += 1
        self.now += self.wait()

    def run(self, most: int = 2000) -> RunReport:
        while self.supervisor.state is not State.STOPPED and self.steps < most:
            self.step()
        assert self.supervisor.step(StepInputs(now=self.now + 1)).command is None or self.steps == most
        return self.supervisor.report
