"""Actions of the end effector: kinematics there and back, the environment, demonstrations, policies."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from blm.app.doctor import _dataset
from blm.datasets.lerobot import open_dataset
from blm.evaluation import PhysicalProtocol, evaluate_physical
from blm.evaluation.gymnasium_envs import make
from blm.evaluation.physical.ready_policy import ReadyPolicy
from blm.evaluation.physical.reference_policies import ReplayPolicy
from blm.planner.collect import CollectConfig, collect
from blm.planner.verify import verify
from blm.policy.policy import CheckpointPolicy
from blm.robots import ROBOTS
from blm.robots.eef import EefKinematics, eef_space, orthonormal
from blm.tasks import EefEnv, Env
from blm.tasks.eef_env import as_poses, control_of
from blm.tasks.randomization import DomainRandomization
from blm.training.loop.loop import LoopConfig
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.policy.train import train_stage2
from blm.types import BlmError, ContractError, PolicyContract


@pytest.fixture(params=ROBOTS)
def robot(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_joints_are_found_again_from_their_pose(robot: str, rng: np.random.Generator) -> None:
    kinematics = EefKinematics(ROBOTS[robot])
    low, high = np.array(ROBOTS[robot].action_space.low[:-1]), np.array(ROBOTS[robot].action_space.high[:-1])
    joints = np.array(ROBOTS[robot].home)
    for _ in range(50):
        following = np.clip(joints + rng.normal(0, 0.05, len(joints)), low, high)
        pose = kinematics.pose(following)
        found = kinematics.joints(pose, joints)
        np.testing.assert_allclose(kinematics.pose(found), pose, atol=5e-5)
        assert np.abs(found - joints).max() < 0.6, "the arm keeps its branch"
        joints = following


def test_a_pose_is_that_of_the_simulated_tool_in_the_base_frame(robot: str) -> None:
    with closing(Env(robot, "push_cube", cameras=())) as env:
        env.reset(seed=3, options={"arm": "random"})
        position, rotation = env.tcp()
        pose = EefKinematics(ROBOTS[robot]).pose(env.state()[:-1].astype(float))
        np.testing.assert_allclose(pose[:3] + ROBOTS[robot].base_position, position, atol=1e-5)
        np.testing.assert_allclose(orthonormal(pose[3:]), rotation, atol=1e-5)


def test_a_pose_out_of_reach_is_approached(robot: str) -> None:
    kinematics = EefKinematics(ROBOTS[robot])
    home = np.array(ROBOTS[robot].home)
    far = kinematics.pose(home)
    far[:3] = (3.0, 0.0, 0.3)
    found = kinematics.joints(far, home)
    space = ROBOTS[robot].action_space
    assert np.isfinite(found).all() and (found >= space.low[:-1]).all() and (found <= space.high[:-1]).all()
    before, after = (np.linalg.norm(far[:3] - kinematics.pose(q)[:3]) for q in (home, found))
    assert after < before


@pytest.mark.parametrize("columns", [(0,) * 6, (1, 0, 0, 2, 0, 0), (0.3, -2, 1, 5, 1, 1), (1, 0, 0, 0, 1, 0)])
def test_any_six_numbers_are_a_rotation(columns: tuple[float, ...]) -> None:
    rotation = orthonormal(np.array(columns))
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(rotation) == pytest.approx(1)


def test_the_environment_holds_and_moves_by_poses(robot: str) -> None:
    with closing(EefEnv(robot, "push_cube", cameras=("base",), image_size=32)) as env:
        seen, _ = env.reset(seed=1)
        assert env.action_space.shape == (10,) and env.observation_space.contains(seen)
        rest = env.resting_action()
        np.testing.assert_allclose(seen["agent_pos"], rest, atol=1e-6)
        for _ in range(20):
            seen, *_ = env.step(rest)
        np.testing.assert_allclose(seen["agent_pos"][:3], rest[:3], atol=0.01)
        goal = rest.copy()
        goal[:3] += (0.03, 0.04, 0.02)
        for _ in range(30):
            seen, *_ = env.step(goal)
        np.testing.assert_allclose(seen["agent_pos"][:3], goal[:3], atol=0.01)
        with pytest.raises(ContractError, match=r"shape \(8,\).* needs \(10,\): x, y, z, rotation_xx"):
            env.step(np.zeros(8, np.float32))


def test_errors_of_sensors_are_those_of_the_joints() -> None:
    level = {"axis": "sensors", "level": 5, "perturbed": True, "cameras": ("base",), "image_size": 32}
    kinematics = EefKinematics(ROBOTS["panda"])
    with (
        closing(make("panda", "push_cube", **level)) as joints,
        closing(make("panda", "push_cube", control="eef", **level)) as poses,
    ):
        for seed in range(5):
            seen, other = joints.reset(seed=seed)[0], poses.reset(seed=seed)[0]
            expected = as_poses(kinematics, seen["agent_pos"][None])[0]
            np.testing.assert_array_equal(other["agent_pos"], expected)
            np.testing.assert_array_equal(other["pixels"]["base"], seen["pixels"]["base"])


def test_gymnasium_makes_it_and_refuses_other_controls() -> None:
    settings: dict[str, Any] = {"control": "eef", "cameras": ("base",), "image_size": 32}
    with closing(gymnasium.make("blm/PickCube-Panda-v0", **settings)) as env:
        assert env.action_space.shape == (10,)
    with pytest.raises(BlmError, match="unknown control 'torque'"):
        make("panda", "push_cube", control="torque")  # type: ignore[arg-type]


def test_demonstrations_of_poses_drive_the_robot_again(tmp_path: Path) -> None:
    """The same episodes as with joint targets, and their replay through inverse kinematics succeeds."""
    common: dict[str, Any] = {
        "robots": ("panda", "widowxai"),
        "tasks": ("push_cube", "pick_cube", "lift_peg_upright"),
        "episodes": 2,
        "cameras": (),
        "workers": 0,
        "randomization": DomainRandomization(),
    }
    collect(CollectConfig(**common, actions="eef"), tmp_path / "poses")
    collect(CollectConfig(**common), tmp_path / "joints")
    episodes = []
    for robot in common["robots"]:
        poses, joints = (open_dataset(tmp_path / name / robot) for name in ("poses", "joints"))
        assert poses.space == eef_space(ROBOTS[robot]) and control_of(robot, poses.space, "the data") == "eef"
        kinematics = EefKinematics(ROBOTS[robot])
        np.testing.assert_allclose(poses.actions, as_poses(kinematics, joints.actions), atol=1e-6)
        np.testing.assert_allclose(poses.states, as_poses(kinematics, joints.states), atol=1e-6)
        (check,) = _dataset(tmp_path / "poses" / robot)
        assert "dataset: good" in check.found
        episodes += [poses.episode(i, cameras=()) for i in range(poses.num_episodes)]
    ready = ReadyPolicy(lambda: ReplayPolicy(episodes))
    protocol = PhysicalProtocol.for_replay(ready.contract, episodes)
    result = evaluate_physical(ready, protocol, tmp_path / "replay", workers=0, videos_per_cell=0)
    assert sum(episode.success_once for episode in result.episodes) >= len(episodes) - 1
    with pytest.raises(BlmError, match=r"poses of the tool.*not get the same joint targets"):
        verify(tmp_path / "poses", workers=0)


@pytest.mark.slow
def test_a_policy_of_poses_is_trained_and_drives_by_the_same_commands(tmp_path: Path) -> None:
    config = CollectConfig(
        robots=("panda",), tasks=("push_cube",), episodes=2, cameras=("base",), workers=0, actions="eef"
    )
    collect(config, tmp_path / "poses")
    training = PolicyTrainingConfig(
        datasets=(tmp_path / "poses/panda",),
        backbone="blm-nano",
        intents=HiddenStateConfig(layer=1, cameras=("base",), workers=0, stride=4),
        loop=LoopConfig(steps=2, batch_size=4),
        cache=tmp_path / "cache",
    )
    checkpoint = train_stage2(training, tmp_path / "run", {})
    ready = ReadyPolicy(partial(CheckpointPolicy.load, checkpoint))
    assert control_of("panda", ready.contract.action_spaces["panda"], "the policy") == "eef"
    protocol = PhysicalProtocol.named(
        "suite24", ready.contract, robots=("panda",), tasks=("push_cube",), episodes=1
    )
    result = evaluate_physical(ready, protocol, tmp_path / "result", workers=0, videos_per_cell=0)
    (episode,) = result.episodes
    assert episode.steps == 200 or episode.success_once


def test_a_space_of_another_robot_and_poses_in_maniskill_are_refused() -> None:
    with pytest.raises(ContractError, match="action spaces of 'panda' differ"):
        control_of("panda", eef_space(ROBOTS["xarm6"]), "the policy")
    contract = PolicyContract(
        action_spaces={"panda": eef_space(ROBOTS["panda"])},
        cameras=("base",),
        image_size=112,
        horizon=16,
        execute=8,
        revision="r",
    )
    protocol = PhysicalProtocol.named("suite24", contract, robots=("panda",), episodes=1)
    protocol.require_fits(contract)
    with pytest.raises(ContractError, match="ManiSkill executes joint targets only"):
        replace(protocol, simulator="maniskill 3.0.1").require_fits(contract)
