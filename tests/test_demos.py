"""Planning, the expert on every robot and task, and the collector through kills and failures."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from blm.data.episodes import open_dataset
from blm.demos.collect import CollectConfig, collect, demonstrate, replay
from blm.demos.expert import HOLD_STEPS, Expert
from blm.demos.planner import CONTROL_STEP, POSITION_TOLERANCE, ArmPlanner, PlanError, make_pose
from blm.demos.primitives import DECOMPOSITIONS
from blm.robots import ROBOTS
from blm.tasks import Env
from blm.types import BlmError, Episode, UnknownNameError

collecting = sys.modules["blm.demos.collect"]
CELLS = list(itertools.product(ROBOTS, DECOMPOSITIONS))
CLEAN = CollectConfig(cameras=(), noise=(0.0,), disturbed=0.0, random_starts=0.0)
SMALL = CollectConfig(
    robots=("widowxai",), tasks=("pick_cube", "push_cube"), episodes=3, cameras=("base",), image_size=64
)


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
        q = planner.solve(pose, home)
        assert q is not None
        assert ((low <= q) & (q <= high)).all()
        reached = planner.forward(q)
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
    start, end = planner.forward(home), make_pose(over(planner, 0.06) + 0.03)
    waypoints = planner.path(home, [end])
    np.testing.assert_array_equal(planner.retime(np.stack([home, home]), 0.2), home[None])
    fast, slow = planner.retime(waypoints, 10.0), planner.retime(waypoints, 0.1)
    np.testing.assert_allclose(fast[-1], waypoints[-1], atol=1e-6)
    line = end.translation() - start.translation()
    length = np.linalg.norm(line)
    assert len(slow) == np.ceil(length / 0.1 / CONTROL_STEP)
    assert len(fast) < len(slow)
    for targets in (fast, slow):
        for q in targets:
            offset = planner.forward(q).translation() - start.translation()
            assert np.linalg.norm(offset - offset @ line / length**2 * line) < 0.004
        at_rest = np.concatenate([[home, home], targets, targets[-1:]])
        speed = np.abs(np.diff(at_rest, axis=0)) / CONTROL_STEP
        change = np.abs(np.diff(at_rest, 2, axis=0)) / CONTROL_STEP**2
        assert (speed <= planner.robot.velocity_limits).all()
        assert (change <= planner.robot.acceleration_limits).all()


def test_what_cannot_be_reached_has_a_reason(planners):
    planner = planners["xarm6"]
    home = np.array(planner.robot.home)
    with pytest.raises(PlanError, match="unreachable"):
        planner.detour(home, make_pose((2.0, 0.0, 0.1)), np.random.default_rng(0))
    with pytest.raises(PlanError, match="ik_failed"):
        planner.path(home, [make_pose((0.0, 0.0, -0.05))])


def test_a_detour_goes_around_the_base_where_lines_cannot(planners):
    planner = planners["xarm6"]
    home = np.array(planner.robot.home)
    behind = np.array([3.1, *home[1:]])
    pose = make_pose(over(planner, 0.2))
    with pytest.raises(PlanError):
        planner.path(behind, [pose])
    waypoints = planner.detour(behind, pose, np.random.default_rng(0))
    np.testing.assert_array_equal(waypoints[0], behind)
    assert not any(planner.collides(q) for q in waypoints)
    assert np.linalg.norm(planner.forward(waypoints[-1]).translation() - pose.translation()) < 1e-3


# --- expert ---


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_expert_solves_every_robot_and_task(experts, cell):
    for seed in (10_000, 10_001):
        episode, reason = demonstrate(experts[cell], seed, CLEAN)
        assert episode is not None, (seed, reason)
        assert episode.primitives[0] == "approach"
        assert episode.primitives[-HOLD_STEPS:] == ("hold",) * HOLD_STEPS
        assert episode.metrics["success_step"] <= len(episode) - HOLD_STEPS
        assert len(episode) < 90
        if cell[1] == "push_cube":
            assert set(episode.actions[np.array(episode.primitives) == "push", -1]) == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_expert_success_rate(experts, cell):
    for config in (CLEAN, CollectConfig(cameras=())):
        reasons = [demonstrate(experts[cell], seed, config)[1] for seed in range(10_000, 10_050)]
        assert sum(not reason for reason in reasons) >= 48, reasons


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


# --- recording ---


def test_replay_repeats_a_clean_episode_bit_for_bit(experts):
    expert = experts["xarm6", "pick_cube"]
    episode, _ = demonstrate(expert, 10_007, dataclasses.replace(CLEAN, random_starts=1.0))
    assert episode is not None
    env = Env("xarm6", "pick_cube", cameras=())
    assert replay(env, episode)
    states = episode.states.copy()
    states[-1, 0] = np.nextafter(states[-1, 0], np.float32(9))
    assert not replay(env, dataclasses.replace(episode, states=states))
    noisy, _ = demonstrate(expert, 10_007, dataclasses.replace(CLEAN, noise=(0.02,)))
    assert noisy is not None
    with pytest.raises(BlmError, match="with noise"):
        replay(env, noisy)


def test_noise_moves_the_arm_and_not_the_labels(experts):
    expert = experts["panda", "pick_cube"]
    clean, _ = demonstrate(expert, 10_002, CLEAN)
    noisy, _ = demonstrate(expert, 10_002, dataclasses.replace(CLEAN, noise=(0.02,)))
    first = clean.primitives.index("descend")
    assert np.abs(clean.states[first // 2] - noisy.states[first // 2]).max() > 0.005
    np.testing.assert_array_equal(clean.actions[: first // 2], noisy.actions[: first // 2])


# --- collector ---


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """An uninterrupted collection, made in this process."""
    out = tmp_path_factory.mktemp("collected")
    collect(dataclasses.replace(SMALL, workers=0), out)
    return out


def test_collection_gives_a_dataset_and_a_summary(collected):
    dataset = open_dataset(collected / "widowxai")
    dataset.require(ROBOTS["widowxai"].action_space, ("base",), 64, 20.0)
    assert sorted(dataset.tasks) == ["pick_cube"] * 3 + ["push_cube"] * 3
    assert dataset.seeds == (10_000, 10_001, 10_002) * 2
    assert dataset.info["blm"]["provenance"]["collect"]["first_seed"] == 10_000
    summary = json.loads((collected / "summary.json").read_text())
    cells = summary["robots"]["widowxai"]
    assert [cells[task]["kept"] for task in SMALL.tasks] == [3, 3]
    assert sum(cells[task]["frames"] for task in SMALL.tasks) == dataset.num_frames
    assert summary["seeds"] == [10_000, 10_002]
    assert sorted(p.name for p in collected.iterdir()) == ["collect.json", "summary.json", "widowxai"]
    episode = dataset.episode(0)
    assert episode.success and episode.images["base"].std() > 10
    assert dataset.success[dataset.starts[1] - HOLD_STEPS : dataset.starts[1]].all()


def test_a_killed_collection_resumes_to_the_same_bytes(collected, tmp_path):
    program = (
        "from pathlib import Path; from blm.demos.collect import CollectConfig, collect\n"
        f"if __name__ == '__main__': collect(CollectConfig(**{dataclasses.asdict(SMALL)!r}), Path('out'))\n"
    )
    (tmp_path / "program.py").write_text(program)
    process = subprocess.Popen(
        [sys.executable, "program.py"], cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL
    )
    journal, deadline = tmp_path / "out/journal.jsonl", time.monotonic() + 60
    while not (journal.exists() and journal.read_text().count("\n") >= 2):
        assert process.poll() is None, "the collection ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/summary.json").exists()
    collect(dataclasses.replace(SMALL, workers=0), tmp_path / "out")
    assert files(tmp_path / "out/widowxai") == files(collected / "widowxai")


def test_a_finished_collection_is_not_made_again(collected, monkeypatch):
    monkeypatch.delattr(collecting, "run_units")
    before = files(collected)
    summary = collect(SMALL, collected)
    assert summary["robots"]["widowxai"]["pick_cube"]["kept"] == 3
    assert files(collected) == before
    with pytest.raises(BlmError, match=r"episodes: 3 there, 4 asked for"):
        collect(dataclasses.replace(SMALL, episodes=4), collected)


def half_rejected(expert, seed, config):
    """Stands in for `demonstrate`: even seeds fail."""
    if seed % 2 == 0:
        return None, "unreachable" if seed % 4 else "dropped"
    vectors = np.full((4, expert.env.contract_space.dim), seed, np.float32)
    episode = Episode(
        robot=expert.env.robot.name, task=expert.env.task, seed=seed, instruction="go",
        states=vectors, actions=vectors, images={},
    )  # fmt: skip
    return episode, ""


def test_rejected_seeds_are_counted_and_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "demonstrate", half_rejected)
    config = dataclasses.replace(CLEAN, robots=("panda",), tasks=("pick_cube",), episodes=4, workers=0)
    summary = collect(config, tmp_path)
    assert open_dataset(tmp_path / "panda").seeds == (10_001, 10_003, 10_005, 10_007)
    cell = summary["robots"]["panda"]["pick_cube"]
    assert cell == {"kept": 4, "rejected": {"dropped": 2, "unreachable": 2}, "frames": 16}
    assert summary["seeds"] == [10_000, 10_007]


def test_a_cell_that_keeps_failing_ends_the_collection(tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "demonstrate", lambda *_: (None, "no_success"))
    config = dataclasses.replace(CLEAN, robots=("panda",), tasks=("pick_cube",), episodes=2, workers=0)
    with pytest.raises(BlmError, match=r"16 attempts gave 0 of 2 episodes; rejected: {'no_success': 16}"):
        collect(config, tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"robots": ("pandas",)}, "pandas"),
        ({"tasks": ("push_cub",)}, "push_cub"),
        ({"image_size": 111}, "even"),
    ],
)
def test_bad_configurations_are_refused(change, said):
    with pytest.raises(BlmError, match=said):
        CollectConfig(**change)
