"""One demonstration: the expert solves a scene while noise, a disturbance or another policy moves the arm.

The recorded action is always the expert's own, the executed one is kept beside it: the data show how to come
back, not how to go astray (as in DART, Laskey et al., CoRL 2017; DAgger, Ross et al., AISTATS 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from blm.chunks import ChunkExecutor
from blm.planner.arm_planner import PlanError
from blm.planner.expert import HOLD_STEPS
from blm.tasks import Env
from blm.types import Episode, FloatArray, Observation, Policy, decision_seed

NOISY = {"approach": 1.0, "lift": 1.0, "move": 1.0, "push": 0.3, "pull": 0.3}
"""Primitives that are executed with noise, and their share of it; near contact there is none."""
SETTLE = 6
"""The noise fades out over the last steps of each motion, or it would never arrive."""
NOISE_MEMORY = 0.9
"""Correlation of the execution noise from step to step."""
PULSE = 8
"""Steps for which a disturbance works the gripper the wrong way."""
TAKE_OVER = (8, 100)
"""A piloting policy drives for a number of steps drawn from this range, then the expert takes over."""


StepOutcome = tuple[dict[str, Any], FloatArray, FloatArray, str, bool]
"""What was seen, the expert's action, the executed one, the primitive, whether the rule held afterwards."""


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """What befalls the execution of one episode."""

    sigma: float
    """Standard deviation of the noise on joint targets [rad]."""
    pulse: int | None
    """Step at which the gripper starts to work the wrong way."""
    random_start: bool
    take_over: int
    """Steps that a pilot drives first; 0 without a pilot."""


class Demonstrator(Protocol):
    """Who knows what to do: our `Expert`, or the scripts of another simulator."""

    env: Env
    drops: int
    planning_seconds: float

    def reset(self, rng: np.random.Generator) -> None: ...

    def check(self) -> None: ...

    def act(self) -> tuple[FloatArray, str]: ...

    @property
    def done(self) -> bool: ...

    @property
    def remaining(self) -> int: ...

    def metrics(self) -> dict[str, float]: ...


def demonstrate(
    expert: Demonstrator, seed: int, draw: Perturbation, rng: np.random.Generator, pilot: Policy | None = None
) -> tuple[Episode | None, str]:
    """Let the expert solve scene `seed`; return the episode, or None and the reason of its rejection.

    Reasons: "unreachable" (the scene is beyond the arm), "planning_..." (see planner.REASONS), "dropped",
    "missed_grasp", "timeout", "missed_goal".
    """
    env = expert.env
    observation, _ = env.reset(seed=seed, options={"arm": "random" if draw.random_start else "home"})
    expert.reset(rng)
    try:
        expert.check()
    except PlanError as error:
        return None, error.reason
    if pilot is not None:
        pilot.reset()
    execute = 1 if pilot is None else pilot.contract.execute
    executor = ChunkExecutor(execute, hold=observation["agent_pos"])
    noise = np.zeros(env.contract_space.dim - 1)
    steps: list[StepOutcome] = []
    while not expert.done and len(steps) < env._max_episode_steps + draw.take_over:
        try:
            action, name = expert.act()
        except PlanError as error:
            return None, f"planning_{error.reason}"
        noise = NOISE_MEMORY * noise + math.sqrt(1 - NOISE_MEMORY**2) * draw.sigma * rng.normal(
            size=len(noise)
        )
        executed = action.copy()
        if pilot is not None and len(steps) < draw.take_over:
            if executor.decision_due:
                executor.receive(_decide(pilot, env, observation, seed, executor.step))
            executed = executor.next_action()
        else:
            executed[:-1] += noise * NOISY.get(name, 0.0) * min(1.0, expert.remaining / SETTLE)
        if draw.pulse is not None and draw.pulse <= len(steps) < draw.pulse + PULSE:
            executed[-1] = 1 - executed[-1]
        following, _, _, _, info = env.step(executed)
        steps.append((observation, action, executed, name, info["success"]))
        observation = following
    if not expert.done or not all(step[-1] for step in steps[-HOLD_STEPS:]):
        return None, _failure(expert, tuple(step[3] for step in steps))
    return _record(expert, seed, draw, steps), ""


def _record(expert: Demonstrator, seed: int, draw: Perturbation, steps: Sequence[StepOutcome]) -> Episode:
    """The episode that these steps make."""
    env = expert.env
    seen, actions, done, names, success = zip(*steps, strict=True)
    return Episode(
        robot=env.robot.name,
        task=env.task,
        seed=seed,
        instruction=env.task_description,
        states=np.stack([o["agent_pos"] for o in seen]),
        actions=np.stack(actions),
        executed=np.stack(done),
        images={camera: np.stack([o["pixels"][camera] for o in seen]) for camera in env.cameras},
        primitives=names,
        metrics={
            "success_step": 1 + max((t for t, ok in enumerate(success) if not ok), default=-1),
            "noise": draw.sigma,
            "disturbed": float(draw.pulse is not None),
            "random_start": float(draw.random_start),
            "piloted_steps": draw.take_over,
            "drops": expert.drops,
            **expert.metrics(),
        },
    )


def _failure(expert: Demonstrator, names: tuple[str, ...]) -> str:
    if expert.drops:
        return "dropped"
    if expert.done:
        return "missed_goal"
    return "missed_grasp" if "grasp" in names and names[-1] in ("approach", "descend", "grasp") else "timeout"


def _decide(policy: Policy, env: Env, seen: dict[str, Any], seed: int, step: int) -> FloatArray:
    """Return the policy's chunk [H, D] for the present observation."""
    observation = Observation(
        images=seen["pixels"],
        state=seen["agent_pos"],
        instruction=env.task_description,
        robot=env.embodiment,
        seed=decision_seed(seed, step),
    )
    return np.asarray(policy.act(observation).actions, dtype=np.float32)


def replay(env: Env, episode: Episode) -> str:
    """Execute the recorded actions from the seed; return "" or what differs from the record.

    States are compared bit for bit, before every step, and success at the end.
    """
    start = "random" if episode.metrics["random_start"] else "home"
    observation, info = env.reset(seed=episode.seed, options={"arm": start})
    executed = episode.actions if episode.executed is None else episode.executed
    for step, (state, action) in enumerate(zip(episode.states, executed, strict=True)):
        if not np.array_equal(observation["agent_pos"], state):
            off = float(np.abs(observation["agent_pos"] - state).max())
            return f"state differs from step {step} on, by {off:.2g}"
        observation, _, _, _, info = env.step(action)
    if bool(info["success"]) != episode.success:
        return f"success is {bool(info['success'])}, recorded {episode.success}"
    return ""
