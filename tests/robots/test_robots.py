"""The arms: published kinematics, valid bodies, servos that hold, grips that last."""

from __future__ import annotations

import dataclasses
import math

import mujoco
import numpy as np
import pytest

from blm.robots import ROBOTS, RobotSpec, add_robot, camera_quaternion
from blm.tasks import Env
from blm.types import BlmError, FloatArray

pi = math.pi
ROBOT = pytest.mark.parametrize("robot", ROBOTS.values(), ids=ROBOTS)


def compiled(robot: RobotSpec) -> tuple[mujoco.MjModel, mujoco.MjData]:
    spec = mujoco.MjSpec()
    add_robot(spec, robot)
    model = spec.compile()
    return model, mujoco.MjData(model)


def tool_pose(robot: RobotSpec, model: mujoco.MjModel, data: mujoco.MjData, angles: FloatArray) -> FloatArray:
    """Pose [4, 4] of the tool in the base's frame."""
    data.qpos[: len(angles)] = angles
    mujoco.mj_kinematics(model, data)
    pose = np.eye(4)
    site = data.site("tcp")
    pose[:3, :3], pose[:3, 3] = site.xmat.reshape(3, 3), site.xpos - robot.base_position
    return pose


def random_angles(robot: RobotSpec, count: int) -> FloatArray:
    space = robot.action_space
    return np.random.default_rng(0).uniform(space.low[:-1], space.high[:-1], (count, space.dim - 1))


def turn(axis: str, angle: float) -> FloatArray:
    c, s = math.cos(angle), math.sin(angle)
    rows = {
        "x": [[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0]],
        "y": [[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0]],
        "z": [[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0]],
    }
    return np.array([*rows[axis], [0, 0, 0, 1]], dtype=float)


def shift(x: float, y: float, z: float) -> FloatArray:
    pose = np.eye(4)
    pose[:3, 3] = x, y, z
    return pose


def panda_tool(q: FloatArray) -> FloatArray:
    """Franka's published modified D-H parameters (a, d, alpha), flange .107, hand -45 deg, tool .1034."""
    table = [
        (0, 0.333, 0), (0, 0, -pi / 2), (0, 0.316, pi / 2), (0.0825, 0, pi / 2),
        (-0.0825, 0.384, -pi / 2), (0, 0, pi / 2), (0.088, 0, pi / 2),
    ]  # fmt: skip
    pose = np.eye(4)
    for (a, d, alpha), angle in zip(table, q, strict=True):
        pose = pose @ turn("x", alpha) @ shift(a, 0, 0) @ turn("z", angle) @ shift(0, 0, d)
    return pose @ shift(0, 0, 0.107) @ turn("z", -pi / 4) @ shift(0, 0, 0.1034)


def standard(table: list[tuple[float, float, float, float]], q: FloatArray) -> FloatArray:
    """Standard D-H: rows (d, alpha, a, offset of the angle)."""
    pose = np.eye(4)
    for (d, alpha, a, offset), angle in zip(table, q, strict=True):
        pose = pose @ turn("z", angle + offset) @ shift(a, 0, d) @ turn("x", alpha)
    return pose


def xarm6_tool(q: FloatArray) -> FloatArray:
    """UFACTORY's published standard D-H parameters of the xArm 6; gripper tool .172."""
    a2, t2 = math.hypot(0.2845, 0.0535), -math.atan(284.5 / 53.5)
    table = [
        (0.267, -pi / 2, 0, 0), (0, 0, a2, t2), (0, -pi / 2, 0.0775, -t2),
        (0.3425, pi / 2, 0, 0), (0, -pi / 2, 0.076, 0), (0.097, 0, 0, 0),
    ]  # fmt: skip
    return standard(table, q) @ shift(0, 0, 0.172)


def xarm7_tool(q: FloatArray) -> FloatArray:
    """UFACTORY's published standard D-H parameters of the xArm 7; gripper tool .172."""
    table = [
        (0.267, -pi / 2, 0, 0), (0, pi / 2, 0, 0), (0.293, pi / 2, 0.0525, 0), (0, pi / 2, 0.0775, 0),
        (0.3425, pi / 2, 0, 0), (0, -pi / 2, 0.076, 0), (0.097, 0, 0, 0),
    ]  # fmt: skip
    return standard(table, q) @ shift(0, 0, 0.172)


def widowxai_tool(q: FloatArray) -> FloatArray:
    """Product of exponentials from the zero pose of Trossen's wxai_follower model (x approaches)."""
    joints = [
        ("z", 1, (0, 0, 0.05725)), ("y", 1, (0.02, 0, 0.1035)), ("y", -1, (-0.244, 0, 0.1035)),
        ("y", -1, (0.001, 0, 0.1635)), ("z", -1, (0.06875, 0, 0.209)), ("x", 1, (0.0977, 0, 0.1635)),
    ]  # fmt: skip
    pose = np.eye(4)
    for (axis, sign, point), angle in zip(joints, q, strict=True):
        pose = pose @ shift(*point) @ turn(axis, sign * angle) @ shift(*(-np.array(point)))
    hand = np.array([[0, 0, 1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    return pose @ shift(0.0977 + 0.156, 0, 0.1635) @ hand


@pytest.mark.parametrize(
    ("name", "published"),
    [("panda", panda_tool), ("xarm6", xarm6_tool), ("xarm7", xarm7_tool), ("widowxai", widowxai_tool)],
)
def test_forward_kinematics_agree_with_the_published_parameters(name, published):
    robot = ROBOTS[name]
    model, data = compiled(robot)
    for angles in [np.zeros(len(robot.home)), np.array(robot.home), *random_angles(robot, 50)]:
        np.testing.assert_allclose(tool_pose(robot, model, data, angles), published(angles), atol=1e-6)


@ROBOT
def test_home_holds_the_tool_vertical_above_the_workspace(robot):
    model, data = compiled(robot)
    pose = tool_pose(robot, model, data, np.array(robot.home))
    position = pose[:3, 3] + robot.base_position
    np.testing.assert_allclose(position[:2], robot.workspace.centre, atol=2e-3)
    assert 0.1 < position[2] < 0.2
    np.testing.assert_allclose(pose[:3, :3], np.diag([1, -1, -1]), atol=2e-3)


@ROBOT
def test_bodies_have_possible_inertias_and_published_mass(robot):
    model, _ = compiled(robot)
    for body in range(2, model.nbody):  # all but the world and the fixed base
        inertia = np.sort(model.body_inertia[body])
        assert inertia[0] > 0, model.body(body).name
        assert inertia[0] + inertia[1] >= inertia[2] * (1 - 1e-9), model.body(body).name
    for index, link in enumerate(robot.links):
        assert model.body(f"link{index + 1}").mass[0] == pytest.approx(link.mass)


@ROBOT
def test_action_order_limits_and_units(robot):
    model, _ = compiled(robot)
    space = robot.action_space
    assert [model.actuator(i).name for i in range(model.nu)] == list(space.names)
    np.testing.assert_allclose(model.actuator_ctrlrange[:-1], np.transpose([space.low, space.high])[:-1])
    np.testing.assert_allclose(model.jnt_range[: model.nu - 1], np.transpose([space.low, space.high])[:-1])
    assert (space.low[-1], space.high[-1], space.units[-1], space.rate_hz) == (0, 1, "opening", 20)
    assert len(robot.velocity_limits) == len(robot.acceleration_limits) == model.nu - 1


@ROBOT
def test_home_and_nearby_poses_touch_nothing(robot):
    env = Env(robot.name, "push_cube", cameras=())
    env.reset(seed=0)
    hand = env.model.body("right_finger").id
    for pair in env.data.contact.geom:
        assert (env.model.geom_bodyid[pair] > hand).any() or (env.model.geom_bodyid[pair] == 0).all()


@ROBOT
def test_holds_home_for_five_seconds(robot):
    env = Env(robot.name, "push_cube", cameras=(), terminate_on_success=False)
    env.reset(seed=1)
    action = np.array([*robot.home, 1.0], dtype=np.float32)
    for _ in range(20):
        env.step(action)
    start, _ = env.tcp()
    for _ in range(100):
        env.step(action)
        assert np.linalg.norm(env.tcp()[0] - start) < 0.005
    np.testing.assert_allclose(env.data.qpos[: len(robot.home)], robot.home, atol=0.005)


@ROBOT
def test_gripper_opening_is_followed_and_measured(robot):
    env = Env(robot.name, "push_cube", cameras=())
    env.reset(seed=1)
    for opening in (0.0, 1.0, 0.5):
        for _ in range(20):
            obs = env.step(np.array([*robot.home, opening], dtype=np.float32))[0]
        assert obs["agent_pos"][-1] == pytest.approx(opening, abs=0.02)


@ROBOT
def test_a_grasped_cube_stays_in_the_hand_while_the_arm_moves(robot):
    env = Env(robot.name, "pick_cube", cameras=(), terminate_on_success=False)
    env.reset(seed=2)
    position, _ = env.tcp()
    env.data.joint("cube").qpos[:] = (*position, 1, 0, 0, 0)
    env.data.joint("cube").qvel[:] = 0
    home = np.array(robot.home)
    env.data.qpos[: len(home)] = home
    env.model.opt.gravity[:] = 0  # until it is held
    for _ in range(15):
        env.step(np.array([*home, 0.0], dtype=np.float32))
    env.model.opt.gravity[:] = (0, 0, -9.81)
    assert env.is_grasping("cube")
    tool, rotation = env.tcp()
    held = rotation.T @ (env.objects()["cube"].position - tool)
    for step in range(60):  # swing to the side and back and turn the wrist, within 1 rad/s
        swing = home.copy()
        swing[0] += 0.5 * math.sin(2 * pi * step / 60)
        swing[-1] += 0.8 * math.sin(2 * pi * step / 60)
        env.step(np.array([*swing, 0.0], dtype=np.float32))
        assert env.is_grasping("cube")
    tool, rotation = env.tcp()
    assert np.linalg.norm(rotation.T @ (env.objects()["cube"].position - tool) - held) < 0.005


def test_cameras_look_at_their_target_with_the_top_up():
    rotation = np.zeros(9)
    mujoco.mju_quat2Mat(rotation, np.array(camera_quaternion((1, 0, 1), (0, 0, 0), (0, 0, 1))))
    right, up, back = rotation.reshape(3, 3).T
    np.testing.assert_allclose(back, [math.sqrt(0.5), 0, math.sqrt(0.5)], atol=1e-12)
    np.testing.assert_allclose(right, [0, 1, 0], atol=1e-12)
    assert up[2] > 0


@ROBOT
def test_a_home_outside_the_limits_is_refused(robot):
    with pytest.raises(BlmError, match="home joint1 is 9"):
        dataclasses.replace(robot, home=(9.0, *robot.home[1:]))
    with pytest.raises(BlmError, match="one home angle for each link"):
        dataclasses.replace(robot, home=robot.home[1:])
