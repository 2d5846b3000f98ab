"""The environment with actions of the end effector in place of joint targets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from blm.robots import ROBOTS, RobotSpec
from blm.robots.eef import EefKinematics, eef_space
from blm.tasks.env import Env
from blm.tasks.task_env import EnvObservation
from blm.types import ActionSpace, FloatArray, lookup

Control = Literal["joint", "eef"]
"""What actions are: joint targets, or poses of the tool in the base frame; then the gripper opening."""
CONTROLS: tuple[Control, ...] = get_args(Control)


class EefEnv(Env):
    """A robot at a table whose actions and states are poses of its tool, [10] with the gripper.

    See `blm.robots.eef` for the form of a pose. Inverse kinematics finds the joint targets, starting
    from those of the step before, so the arm does not change its branch. Everything else, errors of
    the joint sensors included, is as in `Env`.
    """

    def _make_spaces(self) -> None:
        super()._make_spaces()
        self._kinematics = EefKinematics(self.robot)
        space = self.contract_space = eef_space(self.robot)
        self._low, self._high = np.array(space.low), np.array(space.high)
        self.action_space = spaces.Box(self._low.astype(np.float32), self._high.astype(np.float32))
        seen = dict(self.observation_space.items())  # type: ignore[attr-defined]  # it is a Dict
        seen["agent_pos"] = spaces.Box(-np.inf, np.inf, (space.dim,), np.float32)
        self.observation_space = spaces.Dict(seen)  # type: ignore[assignment]

    def _simulate(self, target: FloatArray) -> None:
        joints = self._kinematics.joints(target[:-1], self.data.ctrl[self._arm])
        super()._simulate(np.append(joints, target[-1]))

    def observe(self, cameras: Iterable[str] | None = None) -> EnvObservation:
        seen = super().observe(cameras)
        return {**seen, "agent_pos": as_poses(self._kinematics, seen["agent_pos"][None])[0]}

    def resting_action(self) -> NDArray[np.float32]:
        return as_poses(self._kinematics, self.state()[None])[0]


def as_poses(kinematics: EefKinematics, states: FloatArray) -> NDArray[np.float32]:
    """Return joint states or targets with the gripper opening, [N, dof + 1], as poses of the tool with
    it, float32 [N, 10]."""
    return np.concatenate((kinematics.poses(states[:, :-1]), states[:, -1:]), axis=1).astype(np.float32)


def control_of(robot: str, space: ActionSpace, where: str) -> Control:
    """Return what the actions of a space are. Raises ContractError, with both sides, unless it is one
    of the suite's two for this robot."""
    spec = lookup("robot", robot, ROBOTS)
    if space == eef_space(spec):
        return "eef"
    spec.action_space.require_same(space, where)
    return "joint"


def space_of(robot: RobotSpec, control: Control) -> ActionSpace:
    """Return the action space of a robot's actions of this kind."""
    return eef_space(robot) if control == "eef" else robot.action_space


def env_class(control: Control) -> type[Env]:
    """Return the environment with these actions."""
    return EefEnv if control == "eef" else Env
