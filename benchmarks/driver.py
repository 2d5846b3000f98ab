"""Success of the robot loop with and without acceleration limits, on simulated arms.

    python benchmarks/driver.py [CHECKPOINT] [--seeds 2] [--latency-s 0.1] [--out FILE]

Every scene (task x robot x seed) runs twice: with the accelerations of the arm's data sheet, and
with limits that no command can reach. Velocity limits are those of the data sheet in both runs.
Time is simulated: the loop is the supervisor of `blm.runtime`, its observations come from the
simulator, and the reply to a request arrives `latency_s` later. Seeds are the first of the
validation range, so none is a training or evaluation scene.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from blm.app.policies import load_checkpoint
from blm.evaluation.protocol import PROTOCOLS, VALIDATION_SEEDS
from blm.evaluation.results import this_machine
from blm.evaluation.statistics import paired_difference, success_rate
from blm.robots import ROBOTS
from blm.runtime import Arm, ArmLimits, Safety, State
from blm.runtime.link import ask
from blm.runtime.states import PolicyEvent, StepInputs
from blm.runtime.supervisor import Supervisor
from blm.runtime.timeline import ChunkRequest
from blm.tasks import Env
from blm.types import Policy

UNLIMITED = 1e6
"""Acceleration beyond any change of speed within the velocity limits [rad/s^2]."""
MOST_SEEDS = 5000
SETTLE_STEPS = 10
"""Number of steps after the first success at which success at the end is judged."""


class SimulatedRobot:
    """An `Env` behind the methods of LeRobot's `Robot`."""

    def __init__(self, env: Env) -> None:
        self.env, self.names, self.steps = env, env.contract_space.names, 0
        self.first_success: int | None = None
        self.success = False

    def connect(self) -> None: ...

    def disconnect(self) -> None: ...

    def get_observation(self) -> dict[str, Any]:
        seen = self.env.observe()
        joints = zip(self.names, seen["agent_pos"].tolist(), strict=True)
        return {f"{name}.pos": value for name, value in joints} | seen["pixels"]

    def send_action(self, action: dict[str, Any]) -> None:
        target = np.array([action[f"{name}.pos"] for name in self.names], np.float32)
        self.success = bool(self.env.step(target)[4]["success"])
        self.steps += 1
        if self.success and self.first_success is None:
            self.first_success = self.steps


@dataclass(frozen=True)
class Outcome:
    """The outcome of one scene."""

    once: bool
    at_end: bool
    ended: str
    clamped: int
    held: int
    steps: int


def data_sheet(robot: str, acceleration: float | None = None) -> ArmLimits:
    """Return the limits of the arm's data sheet, or this acceleration for every joint.

    The data sheets are those of `blm/robots`.
    """
    spec = ROBOTS[robot]
    changes = spec.acceleration_limits if acceleration is None else [acceleration] * len(spec.links)
    grip = {} if acceleration is None else {"gripper_acceleration": acceleration}
    return ArmLimits.of(spec.action_space, velocity=spec.velocity_limits, acceleration=changes, **grip)


def drive(policy: Policy, env: Env, limits: ArmLimits, *, seed: int, latency_s: float, steps: int) -> Outcome:
    """Run one scene in simulated time."""
    env.reset(seed=seed)
    robot = SimulatedRobot(env)
    arm = Arm(robot, limits).fitted(policy.contract)
    loop = Supervisor(
        limits,
        policy.contract,
        env.task_description,
        safety=Safety(repeat_s=1e9),
        seconds=steps * limits.period,
        seed=seed,
    )
    now, inbox = 0.0, list[tuple[float, PolicyEvent]]()
    while loop.state is not State.STOPPED:
        arrived = [event for at, event in inbox if at <= now + 1e-9]
        inbox = [(at, event) for at, event in inbox if at > now + 1e-9]
        decision = loop.step(StepInputs(now=now, reading=arm.read(now), events=arrived, can_ask=not inbox))
        if decision.request is not None:
            inbox.append((now + latency_s, answer(policy, decision.request)))
        if decision.command is not None:
            arm.send(decision.command)
            loop.delivered(now)
            if robot.first_success is not None and robot.steps >= robot.first_success + SETTLE_STEPS:
                break
        now += limits.period
    report = loop.report
    once, ended = robot.first_success is not None, report.kind or "solved"
    return Outcome(once, robot.success, ended, report.clamped, report.held, report.steps)


def answer(policy: Policy, request: ChunkRequest) -> PolicyEvent:
    """Call the policy as the link to a server does."""
    return ask(policy, request)


def main(
    checkpoint: tyro.conf.Positional[str] = "blm-nano",
    seeds: int = 2,
    latency_s: float = 0.1,
    steps: int = 200,
    robots: Sequence[str] = PROTOCOLS["suite24"]["robots"],
    tasks: Sequence[str] = PROTOCOLS["suite24"]["tasks"],
    out: Path | None = None,
) -> None:
    """Print success with and without the acceleration limit, and their paired difference."""
    if not 1 <= seeds <= MOST_SEEDS:
        raise SystemExit(f"--seeds must be 1..{MOST_SEEDS}, got {seeds}")
    policy, began = load_checkpoint(Path(checkpoint)), time.monotonic()
    contract, rows = policy.contract, list[tuple[Outcome, Outcome]]()
    for robot in robots:
        for task in tasks:
            env = Env(
                robot,
                task,
                cameras=contract.cameras,
                image_size=contract.image_size,
                terminate_on_success=False,
            )
            for seed in VALIDATION_SEEDS[:seeds]:
                with_limit, without = (
                    drive(policy, env, limits, seed=seed, latency_s=latency_s, steps=steps)
                    for limits in (data_sheet(robot), data_sheet(robot, UNLIMITED))
                )
                rows.append((with_limit, without))
                print(f"{robot} {task} {seed}: with {with_limit}, without {without}", flush=True)
            env.close()
    result = summary(rows) | {
        "checkpoint": checkpoint,
        "latency_s": latency_s,
        "machine": this_machine().to_json(),
    }
    result |= {"seconds": round(time.monotonic() - began), "first_seed": VALIDATION_SEEDS[0], "seeds": seeds}
    print(json.dumps(result))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


def summary(rows: Sequence[tuple[Outcome, Outcome]]) -> dict[str, Any]:
    """Return and print rates with 95 % intervals, paired differences, and the ends of the runs."""
    result: dict[str, Any] = {"n": len(rows)}
    for name in ("once", "at_end"):
        first, second = ([float(getattr(pair[i], name)) for pair in rows] for i in (0, 1))
        gap = paired_difference(first, second)
        result[name] = {"difference": [gap.difference, gap.low, gap.high], "p_value": gap.p_value}
        for label, values in (("limited", first), ("unlimited", second)):
            rate = success_rate(values)
            result[name][label] = [rate.rate, rate.low, rate.high]
            print(f"success {name}, {label}: {rate.rate:.1%} [{rate.low:.1%}, {rate.high:.1%}], n {rate.n}")
        print(f"  paired: {gap.difference:+.1%} [{gap.low:+.1%}, {gap.high:+.1%}], p {gap.p_value:.2}")
    for i, label in enumerate(("limited", "unlimited")):
        runs = [pair[i] for pair in rows]
        steps = sum(run.steps for run in runs)
        result[label] = {
            "ended": dict(Counter(run.ended for run in runs)),
            "clamped": sum(run.clamped for run in runs) / steps,
            "held": sum(run.held for run in runs) / steps,
        }
        print(f"{label}: {result[label]}")
    return result


if __name__ == "__main__":
    tyro.cli(main)
