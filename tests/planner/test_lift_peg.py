"""The expert that stands the peg upright: from home, in states of others' making, and how often it does."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest

from blm.planner.collect import CollectConfig, draw_perturbation
from blm.planner.demonstration import Perturbation, demonstrate
from blm.planner.expert import HOLD_STEPS, Expert
from blm.robots import ROBOTS
from blm.tasks import Env

TASK = "lift_peg_upright"
CALM = Perturbation(sigma=0.0, pulse=None, random_start=False, take_over=0)
QUARTER = np.pi / 2
LYING, STANDING = 0.025, 0.12
STATES = {
    "turned": (LYING, (0.0, 0.0, QUARTER)),
    "turned_and_rolled": (LYING, (QUARTER, 0.0, -0.6)),
    "end_for_end": (LYING, (0.0, 0.0, np.pi)),
    "upright": (STANDING, (0.0, -QUARTER, 0.3)),
}
"""Height of the peg's centre; angles about x, y and z."""


@pytest.fixture(scope="module")
def experts():
    """One expert for each robot, without cameras."""
    envs = {name: Env(name, TASK, cameras=(), terminate_on_success=False) for name in ROBOTS}
    return {name: Expert(env, np.random.default_rng(0)) for name, env in envs.items()}


def put_peg(env: Env, height: float, angles: tuple[float, float, float]) -> None:
    """Put the peg near the centre of its spawn region, beside the tool."""
    quaternion = np.empty(4)
    mujoco.mju_euler2Quat(quaternion, angles, "XYZ")
    x, y = env.task_spec.region(env.robot).centre
    env.data.joint("peg").qpos[:] = (x, y + (0.18 if height == STANDING else 0.0), height, *quaternion)
    mujoco.mj_forward(env.model, env.data)


def run(expert: Expert, limit: int) -> tuple[list[str], list[bool]]:
    """Let the expert act until it is done; return the primitives and whether the task was solved."""
    names, solved = [], []
    while not expert.done and len(names) < limit:
        action, name = expert.act()
        names.append(name)
        solved.append(expert.env.step(action)[4]["success"])
    return names, solved


@pytest.mark.parametrize("seed", [10_000, 10_001])
@pytest.mark.parametrize("robot", ROBOTS)
def test_stands_the_peg_upright_and_lets_go(experts, robot, seed):
    episode, reason = demonstrate(experts[robot], seed, CALM, np.random.default_rng(seed))
    assert episode is not None, reason
    assert len(episode) < 170
    assert episode.primitives[-HOLD_STEPS:] == ("hold",) * HOLD_STEPS
    assert episode.states[-1, -1] > 0.9 and not experts[robot].env.is_grasping("peg")
    assert experts[robot].env.objects()["peg"].is_static


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("robot", ROBOTS)
def test_starts_from_any_lie_of_the_peg(experts, robot, state):
    expert = experts[robot]
    expert.env.reset(seed=10_002)
    expert.reset(np.random.default_rng(0))
    put_peg(expert.env, *STATES[state])
    names, solved = run(expert, limit=200)
    assert expert.done and all(solved[-HOLD_STEPS:])
    assert set(names) == {"hold"} if state == "upright" else "grasp" in names


@pytest.mark.parametrize("robot", ROBOTS)
def test_takes_over_a_half_raised_peg(experts, robot):
    expert = experts[robot]
    env = expert.env
    env.reset(seed=10_003)
    expert.reset(np.random.default_rng(0))
    while env.objects()["peg"].position[2] < 0.06:
        env.step(expert.act()[0])
    expert.reset(np.random.default_rng(1))
    names, solved = run(expert, limit=150)
    assert names[0] == "lift" and "approach" not in names
    assert expert.done and all(solved[-HOLD_STEPS:])


@pytest.mark.parametrize("robot", ROBOTS)
def test_picks_up_a_dropped_peg(experts, robot):
    drop = Perturbation(sigma=0.0, pulse=38, random_start=False, take_over=0)
    episode, reason = demonstrate(experts[robot], 10_004, drop, np.random.default_rng(0))
    assert episode is not None, reason
    lifts = [i for i, name in enumerate(episode.primitives) if name == "lift"]
    assert "approach" in episode.primitives[lifts[0] : lifts[-1]]


@pytest.mark.slow
@pytest.mark.parametrize(("disturbed", "least"), [(False, 0.85), (True, 0.80)])
@pytest.mark.parametrize("robot", ROBOTS)
def test_success_rate(experts, robot, disturbed, least):
    reasons = []
    for seed in range(10_000, 10_050):
        rng = np.random.default_rng((seed, 1))
        draw = draw_perturbation(CollectConfig(), rng) if disturbed else CALM
        reasons.append(demonstrate(experts[robot], seed, draw, rng)[1])
    assert reasons.count("") >= least * len(reasons), reasons
