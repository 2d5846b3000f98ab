"""Actions of the end effector: their space, and kinematics between joints and poses of the tool.

A pose is [9]: the position of the tool centre point [m], then the first two columns of its rotation
matrix (Zhou et al., "On the Continuity of Rotation Representations in Neural Networks", 2019), both in
the frame of the robot's base: x forward, y left, z up. The tool's z axis is the approach direction and
its y axis the closing axis.
"""

from __future__ import annotations

import math
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from blm.robots.build import add_robot
from blm.robots.spec import RobotSpec
from blm.types import ActionSpace, FloatArray

POSE = 9
"""Numbers of a pose."""
ITERATIONS = 60
"""Maximum number of steps of inverse kinematics."""
LARGEST_STEP = 0.2
"""Largest change of a joint in one of them [rad]."""
DAMPING = 0.02
"""Damping of the least squares (Wampler, 1986); it bounds the steps near singular poses."""
CLOSE = 1e-5
"""Error of the pose at which the search ends [m and rad]."""
_WEIGHTS = np.array([1.0] * 3 + [0.2] * 3)
"""Weights of position [1/m] and rotation [1/rad]: where both cannot be reached, 0.2 rad of rotation count as
much as 4 cm (our choice)."""
_FARTHEST = np.array([0.1] * 3 + [0.3] * 3)
"""Largest error that one step corrects [m and rad]: farther away, the Jacobian says little."""
_AXES = ("xx", "xy", "xz", "yx", "yy", "yz")


def eef_space(robot: RobotSpec) -> ActionSpace:
    """Return the space of absolute poses of the tool in the base frame, then the gripper opening.

    States have the same dimensions. No limits are stated for poses: a pose that the arm cannot reach
    is approached as closely as its joints allow.
    """
    free = (math.inf,) * POSE
    return ActionSpace(
        robot=robot.name,
        names=("x", "y", "z", *(f"rotation_{axis}" for axis in _AXES), "gripper"),
        units=("m",) * 3 + ("1",) * 6 + ("opening",),
        low=(*(-one for one in free), 0.0),
        high=(*free, 1.0),
        kind="per_dimension",
        kinds=("absolute_eef_position",) * 3 + ("absolute_eef_rotation",) * 6 + ("gripper",),
        rotation="matrix_6d",
    )


class EefKinematics:
    """Kinematics of one arm between joint positions [dof] and poses of its tool [9]."""

    def __init__(self, robot: RobotSpec) -> None:
        spec = mujoco.MjSpec()
        add_robot(spec, robot)
        self._model = spec.compile()
        self._data = mujoco.MjData(self._model)
        self._dof = len(robot.home)
        self._base = np.array(robot.base_position)
        self._low, self._high = self._model.jnt_range[: self._dof].T
        self._tool = self._model.site("tcp").id

    def pose(self, joints: FloatArray) -> FloatArray:
        """Return the pose [9] of the tool at joint positions [dof]."""
        position, rotation = self._place(joints)
        return np.concatenate((position - self._base, rotation[:, 0], rotation[:, 1]))

    def poses(self, joints: FloatArray) -> FloatArray:
        """Return the poses [N, 9] at joint positions [N, dof]."""
        return np.stack([self.pose(one) for one in joints])

    def joints(self, pose: FloatArray, near: FloatArray) -> FloatArray:
        """Return joint positions [dof] within their limits whose pose is `pose`, or as close to it as
        the search comes, starting from the positions `near`.

        The two columns of the rotation need not be orthonormal: they are made so by Gram-Schmidt, as
        the output of a policy must be.
        """
        wanted, rotation = np.asarray(pose[:3], float) + self._base, orthonormal(pose[3:])
        q = np.clip(np.asarray(near, float), self._low, self._high)
        for _ in range(ITERATIONS):
            position, turned = self._place(q)
            error = np.concatenate((wanted - position, _rotation_vector(rotation @ turned.T)))
            if np.abs(error).max() < CLOSE:
                break
            step = self._step(q, np.clip(error, -_FARTHEST, _FARTHEST))
            moved = np.clip(q + step, self._low, self._high)
            if np.abs(moved - q).max() < 1e-9:  # as close as the joints allow
                break
            q = moved
        return q

    def _step(self, q: FloatArray, error: FloatArray) -> FloatArray:
        """Return the change of the joints [dof] for an error [6], without those that it would drive
        beyond a limit at which they are."""
        jacobian = _WEIGHTS[:, None] * self._jacobian()
        free = np.ones(self._dof, bool)
        step = np.zeros(self._dof)
        for _ in range(self._dof):
            part = jacobian[:, free]
            damped = part @ part.T + DAMPING**2 * np.eye(6)
            step[:] = 0.0
            step[free] = part.T @ np.linalg.solve(damped, _WEIGHTS * error)
            blocked = ((q <= self._low) & (step < 0)) | ((q >= self._high) & (step > 0))
            if not blocked.any():
                break
            free &= ~blocked
        return step * min(1.0, LARGEST_STEP / max(float(np.abs(step).max()), 1e-12))

    def _place(self, joints: FloatArray) -> tuple[FloatArray, FloatArray]:
        self._data.qpos[: self._dof] = joints
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
        rotation = self._data.site_xmat[self._tool].reshape(3, 3)
        return self._data.site_xpos[self._tool].copy(), rotation.copy()

    def _jacobian(self) -> NDArray[Any]:
        """Return the Jacobian [6, dof] of the tool in the world frame at the pose placed last."""
        full = np.zeros((6, self._model.nv))
        mujoco.mj_jacSite(self._model, self._data, full[:3], full[3:], self._tool)
        return full[:, : self._dof]


def orthonormal(columns: FloatArray) -> FloatArray:
    """Return the rotation matrix [3, 3] of two columns [6], by Gram-Schmidt.

    Columns without a direction, or parallel ones, give some rotation, as a policy may ask for any.
    """
    x, y = np.asarray(columns, float).reshape(2, 3)
    x = x / np.linalg.norm(x) if np.linalg.norm(x) > 1e-6 else np.array([1.0, 0.0, 0.0])
    y = y - (x @ y) * x
    if np.linalg.norm(y) < 1e-6:
        y = np.cross(x, np.eye(3)[np.argmin(np.abs(x))])
    y = y / np.linalg.norm(y)
    return np.stack((x, y, np.cross(x, y)), axis=1)


def _rotation_vector(rotation: FloatArray) -> FloatArray:
    """Return axis times angle [3] of a rotation matrix."""
    quaternion, vector = np.empty(4), np.empty(3)
    mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(rotation).ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector
