"""Planning among items: distances, sampled ways, reachability, and carrying a cube over a wall."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from blm.planner import arm_planner as planning
from blm.planner import sampling
from blm.planner.arm_planner import REASONS, ArmPlanner, PlanError, make_pose, path_length
from blm.planner.collision import CLEARANCE, PRESSED, CollisionWorld
from blm.planner.decompositions import DECOMPOSITIONS, KEY_POSES
from blm.planner.expert import TRIES, Expert
from blm.planner.primitives import Candidate, Primitive
from blm.robots import ROBOTS
from blm.tasks import TASKS, Env, ObjectState
from blm.tasks.spec import Item, Part, Region
from blm.types import BlmError

EXAMPLE = Path(__file__).parents[2] / "examples/obstacle.py"
PANDA = ROBOTS["panda"]
HOME = np.array(PANDA.home)
ACROSS = np.pi / 2
"""Yaw at which the gripper is narrow along y."""


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("obstacle", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wall_task(example, monkeypatch):
    """The name of a task with a wall between cube and goal."""
    monkeypatch.setitem(TASKS, example.NAME, example.wall_task())
    monkeypatch.setitem(DECOMPOSITIONS, example.NAME, DECOMPOSITIONS["pick_cube"])
    monkeypatch.setitem(KEY_POSES, example.NAME, KEY_POSES["pick_cube"])
    return example.NAME


def box(name, half, role="free"):
    return Item(name, "cube", "red", (Part("box", half, "red"),), role)


def at(name, position):
    return ObjectState(name, "cube", "red", np.array(position, float), np.array([1.0, 0, 0, 0]))


def expert_in(robot, task):
    return Expert(Env(robot, task, cameras=(), terminate_on_success=False), np.random.default_rng(0))


# --- distances ---


def test_distance_of_the_tool_to_an_item():
    """A plate above the table, a known way below the fingers' tips; the fingers are wider than it is deep."""
    scene = CollisionWorld(PANDA, [box("plate", (0.1, 0.1, 0.01), "fixed")])
    q = ArmPlanner(PANDA).inverse_kinematics(make_pose((0, 0, 0.3)), HOME)
    scene.update({"plate": at("plate", (0, 0, 0.2))})
    assert scene.spare_distance(q, CLEARANCE) == np.inf
    gaps = []
    for height in (0.26, 0.265, 0.27):
        scene.update({"plate": at("plate", (0, 0, height))})
        gaps.append(scene.spare_distance(q))
    np.testing.assert_allclose(np.diff(gaps), -0.005, atol=1e-6)
    assert scene.spare_distance(q, 0.02) == pytest.approx(gaps[-1] - 0.02)
    scene.update({"plate": at("plate", (0, 0, 0.3))})
    assert scene.spare_distance(q) < 0
    scene.update({"plate": at("plate", (0, 0, 0.3))}, touches=["plate"])
    assert scene.spare_distance(q) == np.inf


def test_a_carried_item_moves_with_the_tool_and_keeps_its_distance():
    half, thick = 0.02, 0.01
    items = [box("cube", (half,) * 3), box("wall", (0.2, thick, 0.1), "fixed")]
    planner, scene = ArmPlanner(PANDA, items), CollisionWorld(PANDA, items)
    here, there = make_pose((0, -0.1, 0.3)), make_pose((0.02, 0.1, 0.35))
    q, moved = (planner.inverse_kinematics(pose, HOME) for pose in (here, there))
    tool = planner.forward_kinematics(q)
    cube = at("cube", tool.translation() - [0, 0, 0.07])  # below the fingers, above the wall's foot

    def gap(joints, wall_y, wall_z):
        scene.update({"cube": cube, "wall": at("wall", (0, wall_y, wall_z))}, carried="cube", tool=tool)
        return scene.spare_distance(joints)

    distance = 0.005
    assert gap(q, -0.1 + half + thick + distance, 0.15) == pytest.approx(distance, abs=1e-3)
    assert gap(moved, 0.1 - half - thick - distance, 0.2) == pytest.approx(distance, abs=1e-3)
    assert gap(moved, 0.1, 0.2) < -0.005
    assert gap(q, 0.1, 0.2) == np.inf


def test_a_held_cube_may_stand_on_the_table():
    scene, planner = CollisionWorld(PANDA, [box("cube", (0.02,) * 3)]), ArmPlanner(PANDA)
    q = planner.inverse_kinematics(make_pose((0, 0, 0.02)), HOME)
    scene.update({"cube": at("cube", (0, 0, 0.018))}, carried="cube", tool=planner.forward_kinematics(q))
    assert 0 <= scene.spare_distance(q) <= PRESSED
    scene.update({"cube": at("cube", (0, 0, 0.005))}, carried="cube", tool=planner.forward_kinematics(q))
    assert scene.spare_distance(q) < 0


def test_items_are_named():
    scene = CollisionWorld(PANDA, [box("cube", (0.02,) * 3)])
    with pytest.raises(BlmError, match=r"item 'cub'.*cube"):
        scene.update({}, touches=["cub"])


# --- paths and trajectories ---


def test_a_path_ends_at_its_poses_and_stops_at_an_item():
    planner = ArmPlanner(PANDA, [box("wall", (0.2, 0.01, 0.1), "fixed")])
    start = planner.inverse_kinematics(make_pose((0, -0.15, 0.08)), HOME)
    corner, end = make_pose((0.05, -0.15, 0.2)), make_pose((0, 0.15, 0.08), yaw=0.3)
    waypoints = planner.plan_cartesian(start, [corner, end])  # nothing is placed: nothing is in the way
    np.testing.assert_array_equal(waypoints[0], start)
    places = np.array([planner.forward_kinematics(q).translation() for q in waypoints])
    np.testing.assert_allclose(places[-1], end.translation(), atol=3e-4)
    assert np.linalg.norm(places - corner.translation(), axis=1).min() < 3e-4
    planner.update_collision_world({"wall": at("wall", (0, 0, 0.1))})
    with pytest.raises(PlanError, match="collision"):
        planner.plan_cartesian(start, [end])
    with pytest.raises(PlanError, match="collision: no joints reach"):
        planner.plan_joint_space(start, make_pose((0, 0, 0.1)), np.random.default_rng(0))


@pytest.mark.parametrize("name", ["panda", "xarm6", "widowxai"])
def test_sampled_ways_keep_clear_of_the_wall_and_within_the_limits(name):
    robot = ROBOTS[name]
    (x, y), dof = robot.workspace.centre, len(robot.home)
    planner = ArmPlanner(robot, [box("wall", (0.15, 0.01, 0.06), "fixed")])
    planner.update_collision_world({"wall": at("wall", (x, y, 0.06))})
    start = planner.inverse_kinematics(
        make_pose((x, y - 0.1, 0.05), ACROSS), np.array(robot.home), np.random.default_rng(0)
    )
    goal = make_pose((x, y + 0.1, 0.05), ACROSS)
    with pytest.raises(PlanError, match="no_path"):
        planner.plan_joint_space(start, goal, np.random.default_rng(0), CLEARANCE, sample=False, reach=2.0)
    way = planner.plan_joint_space(start, goal, np.random.default_rng(0), CLEARANCE)
    np.testing.assert_array_equal(way[0], start)
    np.testing.assert_allclose(
        planner.forward_kinematics(way[-1]).translation(), goal.translation(), atol=3e-4
    )
    assert planner.is_free(way, CLEARANCE)
    assert path_length(way) < 3 * np.linalg.norm(way[-1] - start)
    targets = planner.retime(way, 0.35)
    assert planner.is_free(targets, CLEARANCE / 2)
    at_rest = np.concatenate([[start, start], targets, targets[-1:]])
    speed = np.abs(np.diff(at_rest, axis=0)) / planning.CONTROL_STEP
    change = np.abs(np.diff(at_rest, 2, axis=0)) / planning.CONTROL_STEP**2
    assert targets.shape[1] == dof
    assert (speed <= robot.velocity_limits).all() and (change <= robot.acceleration_limits).all()


def test_an_arm_in_contact_can_leave():
    """The tool stands against the wall, closer than any clearance: it may go away, not through."""
    planner = ArmPlanner(PANDA, [box("wall", (0.15, 0.01, 0.06), "fixed")])
    start = planner.inverse_kinematics(make_pose((0, -0.1, 0.06), yaw=ACROSS), HOME, np.random.default_rng(0))
    planner.update_collision_world({})
    wall = next(y for y in np.arange(-0.05, 0, 0.0005) if not _blocked(planner, start, y))
    planner.update_collision_world({"wall": at("wall", (0, wall - 0.002, 0.06))})
    assert planner.collides(start, CLEARANCE) and not planner.collides(start)
    away, through = (make_pose((0, y, 0.06), yaw=ACROSS) for y in (-0.2, 0.1))
    assert len(planner.plan_cartesian(start, [away], CLEARANCE)) > 2
    with pytest.raises(PlanError, match="collision"):
        planner.plan_cartesian(start, [through], CLEARANCE)


def _blocked(planner, q, y):
    planner.update_collision_world({"wall": at("wall", (0, y, 0.06))})
    return planner.collides(q, 0.0)


# --- sampling ---


def outside_a_slab(q):
    return not (abs(q[0]) < 0.3 and np.abs(q[1:]).max() < 1.0)


START, GOAL = np.array([-1.0, 0, 0, 0]), np.array([1.0, 0, 0, 0])
BOX = np.full(4, -2.0), np.full(4, 2.0)


def test_ways_around_a_slab():
    rng = np.random.default_rng(0)
    corners = sampling.rrt_connect(outside_a_slab, START, GOAL, BOX, rng)
    short = sampling.shortcut(outside_a_slab, corners, rng)
    way = sampling.smooth(outside_a_slab, short, 0.02)
    for path in (corners, short, way):
        np.testing.assert_allclose(path[[0, -1]], [START, GOAL], atol=1e-12)
    assert all(outside_a_slab(q) for a, b in pairwise(short) for q in sampling.interpolate(a, b))
    around = 2 * np.hypot(0.7, 1.0) + 0.6
    assert 0.95 * around < path_length(way) < 1.35 * around
    straight = sampling.shortcut(lambda q: True, corners, rng)
    assert path_length(straight) < 1.02 * np.linalg.norm(GOAL - START)
    assert sampling.rrt_connect(lambda q: abs(q[0]) > 0.3, START, GOAL, BOX, rng) is None


def test_waypoints_spread_evenly():
    corners = np.array([[0.0, 0.0], [0.3, 0.0], [0.3, 0.01], [0.3, 0.7]])
    path = sampling.resample(corners, 0.1)
    np.testing.assert_allclose(path[[0, 3, -1]], [[0, 0], [0.3, 0], [0.3, 0.7]], atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(np.diff(path, axis=0), axis=1), 0.1)


PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from tests.planner.test_planner import digest
print(digest([{order}]))
"""


def digest(order):
    """Hash of the ways of several generators, looked up in this order; results are sorted by generator."""
    ways = {}
    for seed in order:
        rng = np.random.default_rng(seed)
        corners = sampling.rrt_connect(outside_a_slab, START, GOAL, BOX, rng)
        ways[seed] = sampling.shortcut(outside_a_slab, corners, rng).tobytes()
    return hashlib.sha256(b"".join(ways[seed] for seed in sorted(ways))).hexdigest()


def test_sampling_depends_on_the_generator_alone():
    """Whatever was drawn before, in this process or another: OMPL's own seeds have no say."""
    here = digest([3, 1, 2])
    sampling.rrt_connect(outside_a_slab, START, GOAL, BOX, np.random.default_rng(9))
    for _ in range(3):
        sampling.util.RNG().uniform01()
    assert digest([2, 3, 1]) == here
    program = PROGRAM.format(root=str(Path(__file__).parents[2]), order="1, 2, 3")
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == here
    assert not run.stderr
    assert digest([1, 2, 4]) != here


def test_a_search_without_end_is_a_timeout(monkeypatch):
    planner = ArmPlanner(PANDA, [box("wall", (0.15, 0.01, 0.06), "fixed")])
    planner.update_collision_world({"wall": at("wall", (0, 0, 0.06))})
    start = planner.inverse_kinematics(make_pose((0, -0.1, 0.05), ACROSS), HOME, np.random.default_rng(0))
    monkeypatch.setattr(sampling, "TIME_LIMIT", -1.0)
    with pytest.raises(PlanError, match="samples") as error:
        planner.plan_joint_space(
            start, make_pose((0, 0.1, 0.05), ACROSS), np.random.default_rng(0), CLEARANCE
        )
    assert error.value.reason == "timeout" and error.value.reason in REASONS


# --- expert ---


def test_a_region_beyond_the_arm_is_unreachable(monkeypatch):
    far = dataclasses.replace(TASKS["pick_cube"], regions={"xarm6": Region((0.5, 0.0), (0.05, 0.05))})
    expert = expert_in("xarm6", "pick_cube")
    expert.env.reset(seed=1)
    expert.check()
    monkeypatch.setitem(TASKS, "pick_cube", far)
    expert = expert_in("xarm6", "pick_cube")
    expert.env.reset(seed=1)
    with pytest.raises(PlanError, match=r"unreachable: 'xarm6'.*key pose 1 of 2 of 'pick_cube'"):
        expert.check()
    assert expert.planning_seconds > 0


def test_metrics_count_what_planning_took():
    expert = expert_in("panda", "pick_cube")
    assert set(expert.metrics().values()) == {0}
    results = []
    for _ in range(2):
        expert.env.reset(seed=10_000)
        expert.reset(np.random.default_rng(0))
        expert.act()
        results.append(expert.metrics())
    assert results[0] == results[1]
    assert results[0]["plans"] == 1 and results[0]["joint_path_rad"] > 0.1
    assert results[0]["candidates_rejected"] == sum(results[0][f"rejected_{reason}"] for reason in REASONS)
    move = Primitive(name="move", opening=1.0, candidates=[Candidate([make_pose((2, 0, 0.1))])])
    expert._decide = lambda state: move
    expert._primitive = dataclasses.replace(expert._primitive, valid=lambda state: False)
    with pytest.raises(PlanError, match="ik_failed"):
        expert.act()
    assert expert.metrics()["rejected_ik_failed"] == results[0]["rejected_ik_failed"] + 1


def test_a_candidate_that_failed_twice_gives_way_to_the_next():
    """An approach that leads to nothing: the same primitive is due again and again at the same place."""
    expert = expert_in("panda", "pick_cube")
    expert.env.reset(seed=10_000)
    expert.reset(np.random.default_rng(0))
    poses = [make_pose((0.0, y, 0.2)) for y in (-0.05, 0.05)]
    candidates = [Candidate([pose]) for pose in poses]
    approach = Primitive(
        name="approach", opening=1.0, candidates=candidates, free=True, valid=lambda state: True
    )
    due = iter([approach, Primitive(name="grasp", opening=0.0)] * 6)
    expert._decide = lambda state: next(due)
    reached = []
    while len(reached) < 4:
        action, name = expert.act()
        if name == "grasp":
            places = [np.linalg.norm(expert.env.tcp()[0] - pose.translation()) for pose in poses]
            reached.append(int(np.argmin(places)))
        expert.env.step(action)
    assert reached == [0] * TRIES + [1] * TRIES
    assert expert.metrics()["rollbacks"] == TRIES


@pytest.mark.parametrize("robot", ["panda", "xarm6"])
def test_the_cube_is_carried_over_a_wall(example, wall_task, robot):
    """Planning, not luck: without its collisions and without sampling, wall and arm or cube meet."""
    expert, blind = expert_in(robot, wall_task), expert_in(robot, wall_task)
    blind.planner.update_collision_world = lambda *_, **__: None
    blind.planner._sampled_paths = lambda *_: []
    good = [solve(example, expert, seed) for seed in range(10)]
    assert sum(good) >= 9, good
    bad = [solve(example, blind, seed) for seed in range(5)]
    assert sum(bad) <= 1, bad


def solve(example, expert, seed):
    """Whether the expert succeeds without anything ever touching the wall."""
    env = expert.env
    env.reset(seed=seed)
    expert.reset(np.random.default_rng((seed, 1)))
    expert.check()
    for _ in range(env.task_spec.max_steps):
        try:
            _, _, _, _, info = env.step(expert.act()[0])
        except PlanError:
            return False
        if example.touches_wall(env):
            return False
        if expert.done:
            return info["success"]
    return False


def test_the_example_writes_a_video(example, wall_task, tmp_path, capsys):
    example.main(tmp_path / "wall.mp4", "xarm6", 1)
    assert "success True, wall touched False" in capsys.readouterr().out
    assert (tmp_path / "wall.mp4").stat().st_size > 10_000
