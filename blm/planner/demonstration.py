"""One demonstration of the expert under noise, disturbances or another policy's actions.

The recorded action is always the expert's; the executed action is stored as well. The data thus
show how to recover from a deviation and not how to deviate, as in DART (Laskey et al., CoRL 2017)
and DAgger (Ross et al., AISTATS 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from blm.chunks import ChunkExecutor, ObservationHistory
from blm.planner.arm_planner import PlanError
from blm.planner.expert import HOLD_STEPS
from blm.tasks import TaskEnv
from blm.tasks.task_env import EnvObservation
from blm.types import Episode, FloatArray, Observation, Policy, decision_seed

NOISY = {"approach": 1.0, "lift": 1.0, "move": 1.0, "push": 0.3, "pull": 0.3}
"""Primitive -> factor of its execution noise; primitives near contact are executed without noise."""
SETTLE = 6
"""Number of control steps at the end of a motion over which the noise fades out."""
NOISE_MEMORY = 0.9
"""Correlation of the execution noise between successive control steps (an AR(1) process)."""
PULSE = 8
"""Number of control steps for which a disturbance inverts the gripper command."""
TAKE_OVER = (8, 100)
"""Default range of the number of steps that a policy controls before the expert takes over."""


class RecordedStep(NamedTuple):
    """One control step of a demonstration."""

    observation: EnvObservation
    action: FloatArray
    """The expert's action [D]."""
    executed: FloatArray
    """The executed action [D]."""
    primitive: str
    success: bool
    """Whether the success rule held after the step."""


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """Disturbances of the execution of one episode."""

    sigma: float
    """Standard deviation of the noise on joint targets [rad]."""
    pulse: int | None
    """Control step from which the gripper command is inverted for PULSE steps, or None."""
    random_start: bool
    take_over: int
    """Number of steps that the policy controls before the expert; 0 without a policy."""


class Demonstrator(Protocol):
    """A source of demonstrations: our `Expert`, or the scripts of another simulator."""

    drops: int
    planning_seconds: float

    @property
    def env(self) -> TaskEnv: ...

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
    """Let the expert solve a scene; return the episode, or None and a rejection reason.

    Reasons: "unreachable" (the arm cannot reach a key pose), "planning_<reason>" (see
    `arm_planner.REASONS`), "dropped", "missed_grasp", "timeout", "missed_goal".
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
    history = ObservationHistory(pilot.contract) if pilot is not None else None
    noise = np.zeros(env.contract_space.dim - 1)
    steps: list[RecordedStep] = []
    while not expert.done and len(steps) < env._max_episode_steps + draw.take_over:
        try:
            action, name = expert.act()
        except PlanError as error:
            return None, f"planning_{error.reason}"
        noise = NOISE_MEMORY * noise + math.sqrt(1 - NOISE_MEMORY**2) * draw.sigma * rng.normal(
            size=len(noise)
        )
        executed = action.copy()
        if pilot is not None and history is not None and len(steps) < draw.take_over:
            if executor.decision_due:
                seen = _observation(env, observation, decision_seed(seed, executor.step))
                executor.receive(np.asarray(pilot.act(history.extend(seen)).actions, dtype=np.float32))
            executed = executor.next_action()
        else:
            executed[:-1] += noise * NOISY.get(name, 0.0) * min(1.0, expert.remaining / SETTLE)
        if draw.pulse is not None and draw.pulse <= len(steps) < draw.pulse + PULSE:
            executed[-1] = 1 - executed[-1]
        following, _, _, _, info = env.step(executed)
        steps.append(RecordedStep(observation, action, executed, name, info["success"]))
        observation = following
    if not expert.done or not all(step.success for step in steps[-HOLD_STEPS:]):
        return None, _failure(expert, tuple(step.primitive for step in steps))
    return _record(expert, seed, draw, steps), ""


def _record(expert: Demonstrator, seed: int, draw: Perturbation, steps: Sequence[RecordedStep]) -> Episode:
    """Build the episode from its recorded steps."""
    env = expert.env
    observations = [step.observation for step in steps]
    last_failure = max((t for t, step in enumerate(steps) if not step.success), default=-1)
    return Episode(
        robot=env.robot.name,
        task=env.task,
        seed=seed,
        instruction=env.task_description,
        states=np.stack([o["agent_pos"] for o in observations]),
        actions=np.stack([step.action for step in steps]),
        executed=np.stack([step.executed for step in steps]),
        images={camera: np.stack([o["pixels"][camera] for o in observations]) for camera in env.cameras},
        primitives=tuple(step.primitive for step in steps),
        metrics={
            "success_step": 1 + last_failure,
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


def _observation(env: TaskEnv, seen: EnvObservation, seed: int) -> Observation:
    return Observation(
        images=seen["pixels"],
        state=seen["agent_pos"],
        instruction=env.task_description,
        robot=env.embodiment,
        seed=seed,
    )


def replay(env: TaskEnv, episode: Episode) -> str:
    """Execute the recorded actions; return "" or a description of the first difference.

    States are compared bit for bit before every step, and success at the end.
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
