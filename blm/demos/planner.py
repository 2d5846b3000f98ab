"""From a tool pose to a joint trajectory: inverse kinematics, reachability, time parameterisation.

Inverse kinematics is a sequence of quadratic programs (`mink`). Collisions are MuJoCo contacts of the arm
with itself and the table. Trajectories are the fastest within joint velocity and acceleration limits
(`toppra`; Pham and Pham, IEEE T-RO 2018), then slowed down evenly to keep to a tool speed.

Poses are those of the site "tcp" in the world: z along the approach direction, y along the closing axis.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import mink
import mujoco
import numpy as np
import toppra
from numpy.typing import NDArray
from toppra.algorithm import TOPPRA
from toppra.constraint import JointAccelerationConstraint, JointVelocityConstraint

from blm.robots import RobotSpec, add_robot

Vector = NDArray[np.floating[Any]]
Pose = mink.SE3

POSITION_TOLERANCE, ROTATION_TOLERANCE = 2e-4, 2e-3
"""An inverse-kinematics solution is accepted within these [m], [rad]."""
TOUCH = 0.003
"""Depth of a contact that is no collision yet [m]: an arm that rests on the table must get away."""
STEPS, STARTS = 25, 4
"""Greatest number of iterations of one solve, and of starting points tried."""
SPACING = 0.04
"""Distance between the waypoints of a path [m]; a quarter turn counts as .16 m."""
LIMIT_SHARE = 0.7
"""Trajectories use this share of the arm's velocity and acceleration limits, so that noise can be added."""
CONTROL_STEP = 0.05
DOWN = np.diag([1.0, -1.0, -1.0])
"""Tool pointing down, its x forward."""


class PlanError(RuntimeError):
    """A motion that the arm cannot make. `reason` is what the rejection counts are kept by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def make_pose(position: Sequence[float] | Vector, yaw: float = 0.0, tilt: float = 0.0) -> Pose:
    """Tool pointing down, turned by `yaw` about the vertical, then tilted about its closing axis.

    With a positive tilt the tool points forward (along its x at tilt 0) and down. Angles in rad.
    """
    rotation = mink.SO3.from_z_radians(yaw) @ mink.SO3.from_matrix(DOWN) @ mink.SO3.from_y_radians(tilt)
    return Pose.from_rotation_and_translation(rotation, np.asarray(position, dtype=np.float64))


class ArmPlanner:
    """Plans for one arm. Joint vectors hold the arm's joints only [rad]."""

    def __init__(self, robot: RobotSpec) -> None:
        spec = mujoco.MjSpec()
        spec.worldbody.add_geom(name="table", type=mujoco.mjtGeom.mjGEOM_PLANE, size=(2, 2, 0.1))
        add_robot(spec, robot)
        self.robot = robot
        self.dof = len(robot.home)
        self._model = spec.compile()
        self._arm = mink.Configuration(self._model)
        self._tool = mink.FrameTask("tcp", "site", position_cost=1.0, orientation_cost=0.3, lm_damping=1e-4)
        self._posture = mink.PostureTask(self._model, cost=1e-3)
        self._limits = [mink.ConfigurationLimit(self._model)]
        self._low, self._high = self._model.jnt_range[: self.dof].T
        velocity, acceleration = (
            LIMIT_SHARE * np.array(limits)[:, None] * [-1, 1]
            for limits in (robot.velocity_limits, robot.acceleration_limits)
        )
        self._constraints = [JointVelocityConstraint(velocity), JointAccelerationConstraint(acceleration)]
        logging.getLogger("toppra").setLevel(logging.ERROR)

    def forward(self, q: Vector) -> Pose:
        """Return the tool pose at joint positions `q`."""
        self._set(q)
        return self._arm.get_transform_frame_to_world("tcp", "site")

    def collides(self, q: Vector) -> bool:
        """Whether the arm, with open fingers, goes into itself or the table. Touching is allowed."""
        self._set(q)
        mujoco.mj_collision(self._model, self._arm.data)
        return bool(self._arm.data.ncon) and self._arm.data.contact.dist.min() < -TOUCH

    def solve(self, pose: Pose, start: Vector, rng: np.random.Generator | None = None) -> Vector | None:
        """Return joint positions that reach `pose`, near `start`, or None.

        With a generator, failing that, also from home and from random joint positions around it.
        """
        for guess in self._guesses(start, rng):
            self._set(guess)
            self._tool.set_target(pose)
            self._posture.set_target_from_configuration(self._arm)
            for _ in range(STEPS):
                error = self._tool.compute_error(self._arm)
                position, rotation = np.linalg.norm(error[:3]), np.linalg.norm(error[3:])
                if position < POSITION_TOLERANCE and rotation < ROTATION_TOLERANCE:
                    q: Vector = self._arm.q[: self.dof].copy()
                    if self.collides(q):
                        break
                    return q
                tasks = [self._tool, self._posture]
                step = mink.solve_ik(self._arm, tasks, 1.0, "daqp", damping=1e-6, limits=self._limits)
                self._arm.integrate_inplace(np.clip(step, -0.5, 0.5), 1.0)
        return None

    def path(self, start: Vector, poses: Sequence[Pose]) -> Vector:
        """Return joint waypoints [K, dof] from `start` along straight lines through `poses`.

        Raises PlanError "ik_failed" where a line leaves the reachable space, changes branch or collides.
        """
        waypoints = [start]
        here = self.forward(start)
        for pose in poses:
            turn = np.linalg.norm((here.rotation().inverse() @ pose.rotation()).log())
            length = max(np.linalg.norm(pose.translation() - here.translation()), 0.1 * turn)
            count = max(int(np.ceil(length / SPACING)), 2)
            for share in np.arange(1, count + 1) / count:
                q = self.solve(_between(here, pose, float(share)), waypoints[-1])
                if q is None or np.abs(q - waypoints[-1]).max() > 0.6:
                    raise PlanError("ik_failed", f"no joint path to {np.round(pose.translation(), 3)}")
                waypoints.append(q)
            here = pose
        return np.array(waypoints)

    def detour(self, start: Vector, pose: Pose, rng: np.random.Generator) -> Vector:
        """Return joint waypoints [K, dof] of a motion in joint space to `pose`, if need be through home.

        Raises PlanError: "unreachable" when no joints do, "no_path" when the motion would collide.
        """
        goal = self.solve(pose, start, rng)
        if goal is None:
            raise PlanError("unreachable", f"no joints reach {np.round(pose.translation(), 3)}")
        home = np.array(self.robot.home)
        for stops in ([start, goal], [start, home, goal]):
            waypoints = np.concatenate([_joint_line(a, b) for a, b in pairwise(stops)])
            blocked = [self.collides(q) for q in (start, *waypoints)]
            out = blocked.index(False) if False in blocked else 0  # a start in contact has to leave it
            if not any(blocked[out:]):
                return np.concatenate([start[None], waypoints])
        raise PlanError("no_path", f"the way to {np.round(pose.translation(), 3)} is blocked")

    def retime(self, waypoints: Vector, speed: float) -> Vector:
        """Return targets [T, dof] at the control rate along `waypoints` [K, dof], from rest to rest.

        The mean speed of the tool along the path is at most `speed` [m/s]. The first waypoint is left out.
        Raises PlanError "retiming_failed".
        """
        distances = np.linalg.norm(np.diff(waypoints, axis=0), axis=1)
        moving = distances > 1e-6
        if not moving.any():
            return waypoints[:1]
        waypoints = waypoints[np.append(True, moving)]
        places = np.append(0.0, np.cumsum(distances[moving]))
        path = toppra.SplineInterpolator(places, waypoints, bc_type="natural")
        grid = np.linspace(0, places[-1], max(4 * len(waypoints), 20))
        trajectory = TOPPRA(self._constraints, path, gridpoints=grid).compute_trajectory(0, 0)
        if trajectory is None:
            raise PlanError("retiming_failed", "no time parameterisation within the joint limits")
        points = np.array([self.forward(q).translation() for q in waypoints])
        length = np.linalg.norm(np.diff(points, axis=0), axis=1).sum()
        count = int(np.ceil(max(trajectory.duration, length / speed) / CONTROL_STEP))
        return np.asarray(trajectory(np.linspace(0, trajectory.duration, count + 1)[1:]))

    def _guesses(self, start: Vector, rng: np.random.Generator | None) -> Iterator[Vector]:
        yield start
        if rng is not None:
            home = np.array(self.robot.home)
            yield home
            for _ in range(STARTS - 1):
                yield np.clip(home + rng.normal(0, 0.5, self.dof), self._low, self._high)

    def _set(self, q: Vector) -> None:
        full = np.full(self._model.nq, self.robot.gripper.stroke)
        full[: self.dof] = np.clip(q, self._low, self._high)
        self._arm.update(full)


def _joint_line(one: Vector, other: Vector) -> Vector:
    """Points [n, dof] from `one`, left out, to `other`, at most .15 rad apart."""
    count = max(int(np.ceil(np.abs(other - one).max() / 0.15)), 1)
    return one + (np.arange(1, count + 1) / count)[:, None] * (other - one)


def _between(one: Pose, other: Pose, share: float) -> Pose:
    """The pose at `share` of a straight line with a steady turn; unlike a screw motion, it does not swing."""
    position = (1 - share) * one.translation() + share * other.translation()
    rotation = one.rotation().interpolate(other.rotation(), share)
    return Pose.from_rotation_and_translation(rotation, position)
