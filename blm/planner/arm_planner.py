"""Motion planning for one arm: inverse kinematics, collision-free paths, time parameterisation.

Inverse kinematics solves a sequence of quadratic programs (`mink`). Paths are straight tool motions
(Cartesian), straight lines in joint space, or paths sampled around obstacles (`sampling`). All are
checked against the collision world (`collision`). Trajectories are time-optimal within the joint
velocity and acceleration limits (`toppra`; Pham and Pham, IEEE T-RO 2018), then slowed down
uniformly to respect a tool speed.

Poses are those of the site "tcp" in the world frame (x forward from the robot, y left, z up). The
tool's z axis is the approach direction and its y axis the closing axis.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import mink
import mujoco
import numpy as np
import toppra
from numpy.typing import NDArray
from toppra.algorithm import TOPPRA
from toppra.constraint import JointAccelerationConstraint, JointVelocityConstraint

from blm.planner.collision import SPARE, TOUCH, CollisionWorld
from blm.planner.sampling import ValidityCheck, interpolate, rrt_connect, shortcut, smooth
from blm.robots import RobotSpec, add_robot
from blm.tasks import ObjectState
from blm.tasks.spec import Item

Vector = NDArray[np.floating[Any]]
Pose = mink.SE3

POSITION_TOLERANCE = 2e-4
"""Position error within which an inverse-kinematics solution is accepted [m]."""
ROTATION_TOLERANCE = 2e-3
"""Rotation error within which an inverse-kinematics solution is accepted [rad]."""
IK_ITERATIONS = 25
"""Maximum number of iterations from one starting point."""
IK_STARTS = 4
"""Number of starting points tried, besides the arm's own joint positions."""
WAYPOINT_SPACING = 0.04
"""Distance between the waypoints of a Cartesian path [m]; a quarter turn counts as 0.16 m."""
NEAR_START = 0.3
"""Clearance that is missing at the start must be regained once a joint has moved this far [rad]."""
SAMPLED_PATHS = 3
"""Number of paths that are sampled; the shortest is used."""
SAMPLING_MARGIN = 1.0
"""Samples lie in the box spanned by start, goal and home, enlarged by this margin [rad]."""
LIMIT_SHARE = 0.7
"""Share of the velocity and acceleration limits that trajectories use; the rest is left for noise."""
CONTROL_STEP = 0.05
"""Duration of one control step [s]: 20 Hz."""
DOWN = np.diag([1.0, -1.0, -1.0])
"""Rotation of a tool that points down, with its x axis forward."""
Reason = Literal["unreachable", "ik_failed", "collision", "no_path", "retiming_failed", "timeout"]
REASONS: dict[Reason, str] = {
    "unreachable": "no joint positions reach the pose",
    "ik_failed": "a straight line leaves the reachable space or changes branch",
    "collision": "the pose or the line goes into the arm, the table or an item",
    "no_path": "every path to the pose is blocked",
    "retiming_failed": "no time parameterisation within the joint limits",
    "timeout": "the search for a path took too long",
}


class PlanError(RuntimeError):
    """A motion that the arm cannot make. Rejections are counted by `reason`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason


def make_pose(position: Sequence[float] | Vector, yaw: float = 0.0, tilt: float = 0.0) -> Pose:
    """Return the pose of a tool that points down at `position` [m].

    It is rotated by `yaw` [rad] about the vertical, then by `tilt` [rad] about its closing axis.
    With a positive tilt the tool points down and forward, i.e. along the x axis that it has at tilt
    0.
    """
    rotation = mink.SO3.from_z_radians(yaw) @ mink.SO3.from_matrix(DOWN) @ mink.SO3.from_y_radians(tilt)
    return Pose.from_rotation_and_translation(rotation, np.asarray(position, dtype=np.float64))


class ArmPlanner:
    """Plans motions of one arm among the items of a task.

    Joint vectors [dof] hold arm joints only [rad].

    There are no items until `update_collision_world` is called. `clearance` [m] is the distance
    that a motion keeps from them.
    """

    def __init__(self, robot: RobotSpec, items: Sequence[Item] = ()) -> None:
        spec = mujoco.MjSpec()
        add_robot(spec, robot)
        self.robot = robot
        self.dof = len(robot.home)
        self._model = spec.compile()
        self._collision_world = CollisionWorld(robot, items)
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

    def update_collision_world(
        self,
        objects: Mapping[str, ObjectState],
        *,
        touches: Collection[str] = (),
        carried: str = "",
        tool: Pose | None = None,
        opening: float = 1.0,
    ) -> None:
        """Set the item poses for the plans that follow; see `CollisionWorld.update`."""
        self._collision_world.update(objects, touches=touches, carried=carried, tool=tool, opening=opening)

    def forward_kinematics(self, q: Vector) -> Pose:
        """Return the tool pose at joint positions `q`."""
        self._set_joints(q)
        return self._arm.get_transform_frame_to_world("tcp", "site")

    def collides(self, q: Vector, clearance: float = -TOUCH) -> bool:
        """Whether the arm collides with itself, the table or an item. Contact alone is allowed."""
        return self._collision_world.spare_distance(q, clearance) < 0

    def inverse_kinematics(
        self, pose: Pose, start: Vector, rng: np.random.Generator | None = None, clearance: float = -TOUCH
    ) -> Vector | None:
        """Return collision-free joint positions [dof] that reach `pose`, or None.

        The search starts at `start`. With a generator it starts again, if need be, at the home pose
        and at random joint positions around it.
        """
        solutions = self._ik_solutions(pose, start, rng)
        return next((q for q in solutions if not self.collides(q, clearance)), None)

    def plan_cartesian(self, start: Vector, poses: Sequence[Pose], clearance: float = -TOUCH) -> Vector:
        """Return joint waypoints [K, dof] from `start` along straight tool motions through `poses`.

        Raises PlanError with reason "ik_failed" if a line leaves the reachable space or changes the
        arm's configuration branch, and "collision" if it is blocked.
        """
        waypoints = [start]
        here = self.forward_kinematics(start)
        for pose in poses:
            turn = np.linalg.norm((here.rotation().inverse() @ pose.rotation()).log())
            length = max(np.linalg.norm(pose.translation() - here.translation()), 0.1 * turn)
            count = max(int(np.ceil(length / WAYPOINT_SPACING)), 2)
            for share in np.arange(1, count + 1) / count:
                target = _interpolate_pose(here, pose, float(share))
                q = next(self._ik_solutions(target, waypoints[-1]), None)
                if q is None or np.abs(q - waypoints[-1]).max() > 0.6:
                    raise PlanError("ik_failed", f"no joint path to {np.round(pose.translation(), 3)}")
                waypoints.append(q)
            here = pose
        if not self.is_free(waypoints, clearance):
            raise PlanError("collision", f"the line to {np.round(here.translation(), 3)} is blocked")
        return np.array(waypoints)

    def plan_joint_space(
        self,
        start: Vector,
        pose: Pose,
        rng: np.random.Generator,
        clearance: float = -TOUCH,
        *,
        sample: bool = True,
        reach: float = np.inf,
    ) -> Vector:
        """Return joint waypoints [K, dof] of a motion in joint space to `pose`.

        Candidates are the straight line, a line through the home pose and, if `sample` is set,
        sampled paths around obstacles. Goals further than `reach` [rad] from the start are ignored.
        Raises PlanError with reason "unreachable", "collision" (at the pose), "no_path" (all paths
        are blocked) or "timeout".
        """
        near = [q for q in self._ik_solutions(pose, start, rng) if np.linalg.norm(q - start) <= reach]
        goals = [q for q in near if not self.collides(q, clearance)]
        where = np.round(pose.translation(), 3)
        if not goals:
            raise PlanError("collision" if near else "unreachable", f"no joints reach {where}")
        goal = min(goals, key=lambda q: float(np.linalg.norm(q - start)))
        home = np.array(self.robot.home)
        for stops in ([start, goal], [start, home, goal]):
            waypoints = np.array([start, *(q for a, b in pairwise(stops) for q in interpolate(a, b, 0.15))])
            if path_length(waypoints) <= 2 * reach and self.is_free(waypoints, clearance):
                return waypoints
        if sample and (paths := self._sampled_paths(start, goal, rng, clearance)):
            return min(paths, key=path_length)
        raise PlanError("no_path", f"every path to {where} is blocked")

    def is_free(self, waypoints: Sequence[Vector] | Vector, clearance: float) -> bool:
        """Whether the motion through the waypoints hits nothing and keeps the clearance at its end."""
        is_valid = self._validity_check(waypoints[0], clearance)
        points = [q for one, other in pairwise(waypoints) for q in interpolate(one, other)]
        return not self.collides(waypoints[-1], clearance) and all(map(is_valid, points))

    def retime(self, waypoints: Vector, speed: float) -> Vector:
        """Time-parameterise `waypoints` [K, dof] from rest to rest.

        Return targets [T, dof] at 20 Hz.

        The mean tool speed along the path is at most `speed` [m/s]. The first waypoint is excluded.
        Raises PlanError with reason "retiming_failed".
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
        points = np.array([self.forward_kinematics(q).translation() for q in waypoints])
        length = np.linalg.norm(np.diff(points, axis=0), axis=1).sum()
        count = int(np.ceil(max(trajectory.duration, length / speed) / CONTROL_STEP))
        return np.asarray(trajectory(np.linspace(0, trajectory.duration, count + 1)[1:]))

    def _ik_solutions(
        self, pose: Pose, start: Vector, rng: np.random.Generator | None = None
    ) -> Iterator[Vector]:
        """Yield joint positions that reach `pose`, colliding or not, from several starting points."""
        for guess in self._ik_seeds(start, rng):
            self._set_joints(guess)
            self._tool.set_target(pose)
            self._posture.set_target_from_configuration(self._arm)
            for _ in range(IK_ITERATIONS):
                error = self._tool.compute_error(self._arm)
                position = np.linalg.norm(error[:3])
                rotation = np.linalg.norm(error[3:])
                if position < POSITION_TOLERANCE and rotation < ROTATION_TOLERANCE:
                    yield self._arm.q[: self.dof].copy()
                    break
                tasks = [self._tool, self._posture]
                step = mink.solve_ik(self._arm, tasks, 1.0, "daqp", damping=1e-6, limits=self._limits)
                self._arm.integrate_inplace(np.clip(step, -0.5, 0.5), 1.0)

    def _ik_seeds(self, start: Vector, rng: np.random.Generator | None) -> Iterator[Vector]:
        yield start
        if rng is not None:
            home = np.array(self.robot.home)
            yield home
            for _ in range(IK_STARTS - 1):
                yield np.clip(home + rng.normal(0, 0.5, self.dof), self._low, self._high)

    def _sampled_paths(
        self, start: Vector, goal: Vector, rng: np.random.Generator, clearance: float
    ) -> list[Vector]:
        """Return paths around obstacles, shortened and smoothed. Raises PlanError "timeout"."""
        is_valid = self._validity_check(start, clearance + SPARE)
        if not is_valid(goal):
            return []
        ends = np.stack([start, goal, self.robot.home])
        low = np.clip(ends.min(0) - SAMPLING_MARGIN, self._low, self._high)
        high = np.clip(ends.max(0) + SAMPLING_MARGIN, self._low, self._high)
        paths = list[Vector]()
        for _ in range(SAMPLED_PATHS):
            try:
                corners = rrt_connect(is_valid, start, goal, (low, high), rng)
            except TimeoutError as error:
                raise PlanError("timeout", str(error)) from None
            if corners is None:
                break
            corners = shortcut(is_valid, corners, rng)
            smoothed = (smooth(is_valid, corners, spacing) for spacing in (0.1, 0.05, 0.02))
            paths += [path for path in smoothed if self.is_free(path, clearance)][:1]
        return paths

    def _validity_check(self, start: Vector, clearance: float) -> ValidityCheck:
        """Return a validity check that is lenient near `start`, to leave contacts."""
        lacking = min(self._collision_world.spare_distance(start, clearance) - 0.001, 0.0)

        def is_valid(q: Vector) -> bool:
            gap = self._collision_world.spare_distance(q, clearance)
            return gap >= 0 or gap >= lacking * (1 - float(np.abs(q - start).max()) / NEAR_START)

        return is_valid

    def _set_joints(self, q: Vector) -> None:
        full = np.full(self._model.nq, self.robot.gripper.stroke)
        full[: self.dof] = np.clip(q, self._low, self._high)
        self._arm.update(full)


def path_length(waypoints: Vector) -> float:
    """Return the length in joint space of a path [K, dof], in rad."""
    return float(np.linalg.norm(np.diff(waypoints, axis=0), axis=1).sum())


def _interpolate_pose(one: Pose, other: Pose, share: float) -> Pose:
    """Return the pose at `share` of a straight line with a uniform rotation.

    Position and rotation are interpolated separately: a screw motion would leave the line.
    """
    position = (1 - share) * one.translation() + share * other.translation()
    rotation = one.rotation().interpolate(other.rotation(), share)
    return Pose.from_rotation_and_translation(rotation, position)
