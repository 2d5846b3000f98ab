"""From a tool pose to a joint trajectory that hits nothing: inverse kinematics, ways, time parameterisation.

Inverse kinematics is a sequence of quadratic programs (`mink`). Ways are straight lines of the tool, straight
lines in joint space, or sampled around obstacles (`sampling`), all checked against the scene (`collision`).
Trajectories are the fastest within joint velocity and acceleration limits (`toppra`; Pham and Pham, IEEE T-RO
2018), then slowed down evenly to keep to a tool speed.

Poses are those of the site "tcp" in the world: z along the approach direction, y along the closing axis.
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

from blm.planner.collision import SPARE, TOUCH, Scene
from blm.planner.sampling import Free, connect, line, shorten, smooth
from blm.robots import RobotSpec, add_robot
from blm.tasks import ObjectState
from blm.tasks.spec import Item

Vector = NDArray[np.floating[Any]]
Pose = mink.SE3

POSITION_TOLERANCE, ROTATION_TOLERANCE = 2e-4, 2e-3
"""An inverse-kinematics solution is accepted within these [m], [rad]."""
STEPS, STARTS = 25, 4
"""Greatest number of iterations of one solve, and of starting points tried."""
SPACING = 0.04
"""Distance between the waypoints of a path [m]; a quarter turn counts as .16 m."""
NEAR_START = 0.3
"""Clearance that is lacking at the start of a motion is regained by when a joint has moved this far [rad]."""
WAYS = 3
"""Ways that are sampled to take the shortest."""
MARGIN = 1.0
"""Sampling stays in the box around start, goal and home, wider by this [rad]."""
LIMIT_SHARE = 0.7
"""Trajectories use this share of the arm's velocity and acceleration limits, so that noise can be added."""
CONTROL_STEP = 0.05
DOWN = np.diag([1.0, -1.0, -1.0])
"""Tool pointing down, its x forward."""
Reason = Literal["unreachable", "ik_failed", "collision", "no_path", "retiming_failed", "timeout"]
REASONS: dict[Reason, str] = {
    "unreachable": "no joint positions reach the pose",
    "ik_failed": "a straight line leaves the reachable space or changes branch",
    "collision": "the pose or the line goes into the arm, the table or an item",
    "no_path": "every way to the pose is blocked",
    "retiming_failed": "no time parameterisation within the joint limits",
    "timeout": "the search for a way took too long",
}


class PlanError(RuntimeError):
    """A motion that the arm cannot make. `reason` is what the rejection counts are kept by."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason


def make_pose(position: Sequence[float] | Vector, yaw: float = 0.0, tilt: float = 0.0) -> Pose:
    """Tool pointing down, turned by `yaw` about the vertical, then tilted about its closing axis.

    With a positive tilt the tool points forward (along its x at tilt 0) and down. Angles in rad.
    """
    rotation = mink.SO3.from_z_radians(yaw) @ mink.SO3.from_matrix(DOWN) @ mink.SO3.from_y_radians(tilt)
    return Pose.from_rotation_and_translation(rotation, np.asarray(position, dtype=np.float64))


class ArmPlanner:
    """Plans for one arm among a task's items. Joint vectors hold the arm's joints only [rad].

    Until `place` is called there are no items. `clearance` [m] is the distance to keep from them on the way.
    """

    def __init__(self, robot: RobotSpec, items: Sequence[Item] = ()) -> None:
        spec = mujoco.MjSpec()
        add_robot(spec, robot)
        self.robot = robot
        self.dof = len(robot.home)
        self._model = spec.compile()
        self._scene = Scene(robot, items)
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

    def place(
        self,
        objects: Mapping[str, ObjectState],
        *,
        touches: Collection[str] = (),
        carried: str = "",
        tool: Pose | None = None,
        opening: float = 1.0,
    ) -> None:
        """Set the items for the next questions; see `collision.Scene.place`."""
        self._scene.place(objects, touches=touches, carried=carried, tool=tool, opening=opening)

    def forward(self, q: Vector) -> Pose:
        """Return the tool pose at joint positions `q`."""
        self._set(q)
        return self._arm.get_transform_frame_to_world("tcp", "site")

    def collides(self, q: Vector, clearance: float = -TOUCH) -> bool:
        """Whether the arm goes into itself, the table or an item. Touching is allowed."""
        return self._scene.gap(q, clearance) < 0

    def solve(
        self, pose: Pose, start: Vector, rng: np.random.Generator | None = None, clearance: float = -TOUCH
    ) -> Vector | None:
        """Return joint positions that reach `pose`, near `start`, without a collision, or None.

        With a generator, failing that, also from home and from random joint positions around it.
        """
        return next((q for q in self._solutions(pose, start, rng) if not self.collides(q, clearance)), None)

    def path(self, start: Vector, poses: Sequence[Pose], clearance: float = -TOUCH) -> Vector:
        """Return joint waypoints [K, dof] from `start` along straight lines through `poses`.

        Raises PlanError: "ik_failed" where a line leaves the reachable space or changes branch, "collision".
        """
        waypoints = [start]
        here = self.forward(start)
        for pose in poses:
            turn = np.linalg.norm((here.rotation().inverse() @ pose.rotation()).log())
            length = max(np.linalg.norm(pose.translation() - here.translation()), 0.1 * turn)
            count = max(int(np.ceil(length / SPACING)), 2)
            for share in np.arange(1, count + 1) / count:
                q = next(self._solutions(_between(here, pose, float(share)), waypoints[-1]), None)
                if q is None or np.abs(q - waypoints[-1]).max() > 0.6:
                    raise PlanError("ik_failed", f"no joint path to {np.round(pose.translation(), 3)}")
                waypoints.append(q)
            here = pose
        if not self.is_free(waypoints, clearance):
            raise PlanError("collision", f"the line to {np.round(here.translation(), 3)} is blocked")
        return np.array(waypoints)

    def detour(
        self,
        start: Vector,
        pose: Pose,
        rng: np.random.Generator,
        clearance: float = -TOUCH,
        *,
        sample: bool = True,
        reach: float = np.inf,
    ) -> Vector:
        """Return joint waypoints [K, dof] of a motion in joint space to `pose`, any way there is.

        Tried are the straight line, the one through home and, to `sample`, ways around obstacles; joints
        further than `reach` [rad] from the start do not count. Raises PlanError: "unreachable", "collision"
        at the pose, "no_path" when the ways are blocked, "timeout".
        """
        near = [q for q in self._solutions(pose, start, rng) if np.linalg.norm(q - start) <= reach]
        goals = [q for q in near if not self.collides(q, clearance)]
        where = np.round(pose.translation(), 3)
        if not goals:
            raise PlanError("collision" if near else "unreachable", f"no joints reach {where}")
        goal, home = min(goals, key=lambda q: float(np.linalg.norm(q - start))), np.array(self.robot.home)
        for stops in ([start, goal], [start, home, goal]):
            waypoints = np.array([start, *(q for a, b in pairwise(stops) for q in line(a, b, 0.15))])
            if path_length(waypoints) <= 2 * reach and self.is_free(waypoints, clearance):
                return waypoints
        if sample and (ways := self._sampled(start, goal, rng, clearance)):
            return min(ways, key=path_length)
        raise PlanError("no_path", f"the way to {where} is blocked")

    def is_free(self, waypoints: Sequence[Vector] | Vector, clearance: float) -> bool:
        """Whether the motion through the waypoints hits nothing, and its end keeps the clearance."""
        free = self._tolerant(waypoints[0], clearance)
        points = [q for one, other in pairwise(waypoints) for q in line(one, other)]
        return not self.collides(waypoints[-1], clearance) and all(map(free, points))

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

    def _solutions(
        self, pose: Pose, start: Vector, rng: np.random.Generator | None = None
    ) -> Iterator[Vector]:
        """Joint positions that reach `pose`, collisions or not, from several starting points."""
        for guess in self._guesses(start, rng):
            self._set(guess)
            self._tool.set_target(pose)
            self._posture.set_target_from_configuration(self._arm)
            for _ in range(STEPS):
                error = self._tool.compute_error(self._arm)
                position, rotation = np.linalg.norm(error[:3]), np.linalg.norm(error[3:])
                if position < POSITION_TOLERANCE and rotation < ROTATION_TOLERANCE:
                    yield self._arm.q[: self.dof].copy()
                    break
                tasks = [self._tool, self._posture]
                step = mink.solve_ik(self._arm, tasks, 1.0, "daqp", damping=1e-6, limits=self._limits)
                self._arm.integrate_inplace(np.clip(step, -0.5, 0.5), 1.0)

    def _guesses(self, start: Vector, rng: np.random.Generator | None) -> Iterator[Vector]:
        yield start
        if rng is not None:
            home = np.array(self.robot.home)
            yield home
            for _ in range(STARTS - 1):
                yield np.clip(home + rng.normal(0, 0.5, self.dof), self._low, self._high)

    def _sampled(
        self, start: Vector, goal: Vector, rng: np.random.Generator, clearance: float
    ) -> list[Vector]:
        """Ways around obstacles, each short and smooth. Raises PlanError "timeout"."""
        free = self._tolerant(start, clearance + SPARE)
        if not free(goal):
            return []
        ends, ways = np.stack([start, goal, self.robot.home]), list[Vector]()
        low, high = (np.clip(q, self._low, self._high) for q in (ends.min(0) - MARGIN, ends.max(0) + MARGIN))
        for _ in range(WAYS):
            try:
                corners = connect(free, start, goal, (low, high), rng)
            except TimeoutError as error:
                raise PlanError("timeout", str(error)) from None
            if corners is None:
                break
            corners = shorten(free, corners, rng)
            tries = (smooth(free, corners, spacing) for spacing in (0.1, 0.05, 0.02))
            ways += [way for way in tries if self.is_free(way, clearance)][:1]
        return ways

    def _tolerant(self, start: Vector, clearance: float) -> Free:
        """A test of joint positions. Around `start` it asks for less, so that contacts can be left."""
        lacking = min(self._scene.gap(start, clearance) - 0.001, 0.0)

        def free(q: Vector) -> bool:
            gap = self._scene.gap(q, clearance)
            return gap >= 0 or gap >= lacking * (1 - float(np.abs(q - start).max()) / NEAR_START)

        return free

    def _set(self, q: Vector) -> None:
        full = np.full(self._model.nq, self.robot.gripper.stroke)
        full[: self.dof] = np.clip(q, self._low, self._high)
        self._arm.update(full)


def path_length(waypoints: Vector) -> float:
    """Length in joint space of a path [K, dof] [rad]."""
    return float(np.linalg.norm(np.diff(waypoints, axis=0), axis=1).sum())


def _between(one: Pose, other: Pose, share: float) -> Pose:
    """The pose at `share` of a straight line with a steady turn; unlike a screw motion, it does not swing."""
    position = (1 - share) * one.translation() + share * other.translation()
    rotation = one.rotation().interpolate(other.rotation(), share)
    return Pose.from_rotation_and_translation(rotation, position)
