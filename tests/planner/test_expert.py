"""Planning, and the expert on every robot and task."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from blm.planner.arm_planner import CONTROL_STEP, POSITION_TOLERANCE, ArmPlanner, PlanError, make_pose
from blm.planner.collect import CollectConfig, draw_perturbation
from blm.planner.demonstration import demonstrate
from blm.planner.expert import HOLD_STEPS, Expert
from blm.robots import ROBOTS
from blm.tasks import SUITE24, Env
from blm.types import UnknownNameError

CELLS = list(itertools.product(ROBOTS, SUITE24))
CLEAN = CollectConfig(cameras=(), noise=(0.0,), disturbed=0.0, random_starts=0.0)


def attempt(expert, seed, config):
    """One demonstration as the collector makes it."""
    rng = np.random.default_rng((seed, 1))
    return demonstrate(expert, seed, draw_perturbation(config, rng), rng)


@pytest.fixture(scope="module")
def experts():
    """One expert for each robot and task, without cameras."""
    envs = {cell: Env(*cell, cameras=(), terminate_on_success=False) for cell in CELLS}
    return {cell: Expert(env, np.random.default_rng(0)) for cell, env in envs.items()}


@pytest.fixture(scope="module")
def planners():
    return {name: ArmPlanner(robot) for name, robot in ROBOTS.items()}


def over(planner, height) -> np.ndarray:
    return np.array([*planner.robot.workspace.centre, height])


# --- planner ---


@pytest.mark.parametrize("name", ROBOTS)
def test_inverse_kinematics_inverts_forward_kinematics(planners, name):
    planner, rng = planners[name], np.random.default_rng(0)
    home, area = np.array(planner.robot.home), planner.robot.workspace
    low, high = np.array([(joint.low, joint.high) for joint in planner.robot.joints]).T
    for _ in range(20):
        place = over(planner, 0.0) + rng.uniform((-area.half, -area.half, 0.02), (area.half, area.half, 0.15))
        pose = make_pose(place, yaw=rng.uniform(-0.7, 0.7), tilt=0.2)
        q = planner.inverse_kinematics(pose, home)
        assert q is not None
        assert ((low <= q) & (q <= high)).all()
        reached = planner.forward_kinematics(q)
        assert np.linalg.norm(reached.translation() - place) < POSITION_TOLERANCE
        np.testing.assert_allclose(reached.rotation().as_matrix(), pose.rotation().as_matrix(), atol=3e-3)


def test_tool_points_down_and_forward():
    np.testing.assert_allclose(make_pose((0, 0, 0)).rotation().as_matrix(), np.diag([1, -1, -1]), atol=1e-12)
    tilted = make_pose((0, 0, 0), yaw=np.pi / 2, tilt=np.pi / 6).rotation().as_matrix()
    np.testing.assert_allclose(tilted[:, 2], [0, 0.5, -np.sqrt(0.75)], atol=1e-12)


@pytest.mark.parametrize("name", ROBOTS)
def test_trajectories_keep_to_the_line_and_the_limits(planners, name):
    planner = planners[name]
    home = np.array(planner.robot.home)
    start, end = planner.forward_kinematics(home), make_pose(over(planner, 0.06) + 0.03)
    waypoints = planner.plan_cartesian(home, [end])
    np.testing.assert_array_equal(planner.retime(np.stack([home, home]), 0.2), home[None])
    fast, slow = planner.retime(waypoints, 10.0), planner.retime(waypoints, 0.1)
    np.testing.assert_allclose(fast[-1], waypoints[-1], atol=1e-6)
    line = end.translation() - start.translation()
    length = np.linalg.norm(line)
    assert len(slow) == np.ceil(length / 0.1 / CONTROL_STEP)
    assert len(fast) < len(slow)
    for targets in (fast, slow):
        for q in targets:
            offset = planner.forward_kinematics(q).translation() - start.translation()
            assert np.linalg.norm(offset - offset @ line / length**2 * line) < 0.004
        at_rest = np.concatenate([[home, home], targets, targets[-1:]])
        speed = np.abs(np.diff(at_rest, axis=0)) / CONTROL_STEP
        change = np.abs(np.diff(at_rest, 2, axis=0)) / CONTROL_STEP**2
        assert (speed <= planner.robot.velocity_limits).all()
        assert (change <= planner.robot.acceleration_limits).all()


def test_unreachable_poses_have_a_reason(planners):
    planner = planners["xarm6"]
    home = np.array(planner.robot.home)
    with pytest.raises(PlanError, match="unreachable"):
        planner.plan_joint_space(home, make_pose((2.0, 0.0, 0.1)), np.random.default_rng(0))
    with pytest.raises(PlanError, match="collision"):
        planner.plan_cartesian(home, [make_pose((0.0, 0.0, -0.05))])


def test_a_detour_goes_around_the_base_where_lines_cannot(planners):
    planner = planners["xarm6"]
    home = np.array(planner.robot.home)
    behind = np.array([3.1, *home[1:]])
    pose = make_pose(over(planner, 0.2))
    with pytest.raises(PlanError):
        planner.plan_cartesian(behind, [pose])
    waypoints = planner.plan_joint_space(behind, pose, np.random.default_rng(0))
    np.testing.assert_array_equal(waypoints[0], behind)
    assert not any(planner.collides(q) for q in waypoints)
    assert np.linalg.norm(planner.forward_kinematics(waypoints[-1]).translation() - pose.translation()) < 1e-3


# --- expert ---


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_expert_solves_every_robot_and_task(experts, cell):
    for seed in (10_000, 10_001):
        episode, reason = attempt(experts[cell], seed, CLEAN)
        assert episode is not None, (seed, reason)
        assert episode.primitives[0] == "approach"
        assert episode.primitives[-HOLD_STEPS:] == ("hold",) * HOLD_STEPS
        assert episode.metrics["success_step"] <= len(episode) - HOLD_STEPS
        assert len(episode) < 120
        if cell[1] == "push_cube":
            assert set(episode.actions[np.array(episode.primitives) == "push", -1]) == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_expert_success_rate(experts, cell):
    """100 consecutive seeds; only scenes beyond the arm do not count, and there are few of them."""
    least = 0.85 if cell[1] == "lift_peg_upright" else 0.95
    for config in (CLEAN, CollectConfig(cameras=())):
        reasons = [attempt(experts[cell], seed, config)[1] for seed in range(10_000, 10_100)]
        reachable = [reason for reason in reasons if reason != "unreachable"]
        assert len(reachable) > 90, reasons
        assert reachable.count("") >= least * len(reachable), reasons


def test_a_dropped_cube_is_picked_up_again(experts):
    expert = experts["xarm7", "pick_cube"]
    expert.env.reset(seed=10_004)
    expert.reset(np.random.default_rng(0))
    names = []
    while not expert.done:
        action, primitive = expert.act()
        names.append(primitive)
        if primitive == "move" and 4 <= names.count("move") < 8:
            action[-1] = 1.0  # somebody opens the fingers
        _, _, _, late, info = expert.env.step(action)
        assert not late
    assert info["success"] and expert.drops >= 1
    assert "grasp" in names[names.index("move") :]


@pytest.mark.parametrize("cell", [("panda", "push_cube"), ("xarm6", "pick_cube"), ("widowxai", "pick_cube")])
def test_expert_takes_over_from_a_wild_policy(experts, cell):
    expert = experts[cell]
    for seed in (10_000, 10_001):
        rng = np.random.default_rng(seed)
        expert.env.reset(seed=seed, options={"arm": "random"})
        expert.reset(rng)
        wild, speed = expert.env.data.ctrl[:-1].copy(), 0.0
        for _ in range(30):
            expert.act()
            speed = 0.8 * speed + rng.normal(0, 0.02, len(wild))
            wild = wild + speed
            expert.env.step(np.append(wild, rng.integers(2)).astype(np.float32))
        for _ in range(160):
            _, _, _, _, info = expert.env.step(expert.act()[0])
            if expert.done:
                break
        assert info["success"]


def test_a_task_without_an_expert_is_named():
    env = Env("panda", "pick_cube", cameras=())
    env.task = "fold_towel"
    with pytest.raises(UnknownNameError, match=r"fold_towel.*pick_cube"):
        Expert(env, np.random.default_rng(0))
