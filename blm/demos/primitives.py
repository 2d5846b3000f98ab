"""Task decomposition: which primitive is due in a measured state, and which tool poses would do it.

Every function here is a pure function of the `View`, so that the expert can take over in any state: after a
missed grasp the fingers are open or through, so a new approach is due; after a drop nothing is held, so it is
due as well. Geometry: the tool frame has z along the approach and y along the closing axis; `unit` vectors and
positions are in the world. A cube's half side is called `half`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from mink import SO3

from blm.demos.planner import Pose, Vector, make_pose
from blm.robots import RobotSpec
from blm.tasks import ObjectState

TILTS = np.radians((0, 20, 40, 60))
"""How far the tool may lean: a short arm reaches more with a tilted tool."""
HOVER = 0.08
"""Distance at which the tool waits before it closes in on an object [m]."""
PUSH_HEIGHT = 0.03
"""Height of the tool while it pushes [m]: lower ones rub the table and stall."""
GAP = 0.02
"""Free space between tool and cube before a push [m]."""
FINGER = 0.011
"""Half the thickness of a finger along the push [m]."""
PUSH_SHORT, CARRY_NEAR = 0.03, 0.008
"""A push ends this far before its goal, a carry when the cube is this near [m]."""
ALIGNED = np.radians(10)
FAST, CAREFUL = 0.35, 0.20
"""Mean tool speeds in free space and near objects [m/s]."""


Path = tuple[list[Pose], list[Pose]]
"""Tool poses to go through in straight lines, then those of the next primitive, which must be reachable too."""


@dataclass(frozen=True)
class View:
    """The measured state of arm and scene."""

    robot: RobotSpec
    tool: Pose
    opening: float
    objects: dict[str, ObjectState]
    held: Callable[[str], bool]

    @property
    def place(self) -> Vector:
        """Position of the tool [m]."""
        return self.tool.translation()

    def in_tool(self, point: Vector) -> Vector:
        """A world point in the tool's frame."""
        return self.tool.inverse() @ point


@dataclass(frozen=True, kw_only=True)
class Step:
    """One primitive: ranked candidate paths of tool poses, and when it stops being the right thing to do."""

    primitive: str
    opening: float
    """Gripper command."""
    paths: Callable[[], Iterator[Path]] | None = None
    """None: stay where the arm was last sent."""
    free: bool = False
    """The way does not matter, so a motion in joint space will do where straight lines are not possible."""
    speed: float = FAST
    valid: Callable[[View], bool] = lambda view: True
    """False: give this primitive up at once and decide again."""


def pick(view: View) -> Step:
    """Grasp the cube and hold it at the goal."""
    cube, goal = view.objects["cube"], view.objects["goal"]
    return carry(view, cube, goal.position) if view.held(cube.name) else grasp(view, cube)


def push(view: View) -> Step:
    """Push the cube until it is well inside the target."""
    cube, target = view.objects["cube"], view.objects["target"]
    return push_towards(view, cube, target.position)


DECOMPOSITIONS: dict[str, Callable[[View], Step]] = {"pick_cube": pick, "push_cube": push}
"""Task -> what to do now. To teach the expert a task, add a function of the measured state."""


def grasp(view: View, cube: ObjectState) -> Step:
    """Hover above the cube with open fingers, close in, close the fingers; again when they missed it."""
    half = cube.size[1]
    needed = half / view.robot.gripper.stroke
    local = view.in_tool(cube.position)
    turn = _turn_to_cube(view, cube)
    above = abs(local[0]) < 0.012 and abs(local[1]) < 0.012 and turn < ALIGNED
    if above and abs(local[2]) < 0.012 and view.opening > 0.8 * needed:
        return Step(primitive="grasp", opening=0.0, valid=lambda now: False)

    def still(now: View) -> bool:
        return bool(np.linalg.norm(now.objects[cube.name].position - cube.position) < 0.008)

    if above and 0 < local[2] < 1.5 * HOVER and view.opening > min(1.3 * needed, 0.95):
        paths = lambda: (([pose], []) for pose in _grasp_poses(view, cube))  # noqa: E731
        return Step(primitive="descend", opening=1.0, paths=paths, speed=CAREFUL, valid=still)

    def approach() -> Iterator[Path]:
        for pose in _grasp_poses(view, cube):
            yield [*_clear(view), _back(pose, HOVER)], [pose]

    return Step(primitive="approach", opening=1.0, paths=approach, valid=still, free=True)


def carry(view: View, cube: ObjectState, goal: Vector) -> Step:
    """Bring the held cube to `goal`; it hangs in the hand where it was measured, not where it was planned."""
    offset = view.in_tool(cube.position)

    def held(now: View) -> bool:
        return now.held(cube.name)

    def to(point: Vector) -> Iterator[Path]:
        for rotation in _rotations(view):
            yield [Pose.from_rotation_and_translation(rotation, point - rotation.apply(offset))], []

    if np.linalg.norm(cube.position - goal) < CARRY_NEAR:
        return Step(primitive="hold", opening=0.0, valid=lambda now: False)
    away = np.linalg.norm((cube.position - goal)[:2])
    if cube.position[2] < cube.size[2] + 0.03 and away > 0.03:
        lifted = cube.position + [0, 0, 0.05]
        return Step(primitive="lift", opening=0.0, paths=lambda: to(lifted), speed=CAREFUL, valid=held)
    return Step(primitive="move", opening=0.0, paths=lambda: to(goal), valid=held, free=True)


def push_towards(view: View, cube: ObjectState, goal: Vector) -> Step:
    """Go behind the cube with closed fingers and push it in a straight line to `goal`."""
    there = (goal - cube.position)[:2]
    distance = float(np.linalg.norm(there))
    if distance <= PUSH_SHORT:
        return Step(primitive="hold", opening=0.0, valid=lambda now: False)
    unit = there / distance
    heading = np.arctan2(unit[1], unit[0]) + np.array([0, np.pi / 2])
    yaws = heading - np.pi * np.round(heading / np.pi)  # the closed fingers are the same from both sides
    contact = cube.size[0] + FINGER

    def at(along: float) -> Vector:
        return np.array([*(cube.position[:2] + along * unit), PUSH_HEIGHT])

    def offset(now: View) -> tuple[float, float]:
        """How far the tool is from the cube, along the push and to its side."""
        gap = (now.place - now.objects[cube.name].position)[:2]
        return float(gap @ unit), float(abs(gap[0] * unit[1] - gap[1] * unit[0]))

    def behind(now: View) -> bool:
        along, side = offset(now)
        return along < -0.8 * cube.size[0] and side < 0.015

    closed = view.opening < 0.15
    low = abs(view.place[2] - PUSH_HEIGHT) < 0.012
    poses = [make_pose(at(0.0), yaw, tilt) for yaw, tilt in product(yaws, TILTS)]
    nearest = sorted(poses, key=_distance_from(view))
    end = at(distance - PUSH_SHORT / 2 - contact)
    if closed and low and behind(view) and offset(view)[0] > -contact - 2 * GAP:
        ends = lambda: (([_moved(pose, end)], []) for pose in nearest)  # noqa: E731
        return Step(primitive="push", opening=0.0, paths=ends, speed=CAREFUL, valid=behind)
    stand = at(-contact - GAP)

    def still(now: View) -> bool:
        return bool(np.linalg.norm(now.objects[cube.name].position - cube.position) < 0.008)

    if closed and np.linalg.norm((view.place - stand)[:2]) < 0.012:
        down = lambda: (([_moved(pose, stand)], []) for pose in nearest)  # noqa: E731
        return Step(primitive="descend", opening=0.0, paths=down, speed=CAREFUL, valid=still)
    above = stand + [0, 0, HOVER]

    def approach() -> Iterator[Path]:
        for pose in poses:
            yield [*_clear(view), _moved(pose, above)], [_moved(pose, stand), _moved(pose, end)]

    return Step(primitive="approach", opening=0.0, paths=approach, valid=still, free=True)


def _grasp_poses(view: View, cube: ObjectState) -> list[Pose]:
    """Tool poses around the cube, best first: the least turn from where the tool is, then the least tilt."""
    axes = _cube_yaws(cube)
    poses = [make_pose(cube.position, yaw, tilt) for yaw, tilt in product(axes, TILTS)]
    return sorted(poses, key=_distance_from(view))


def _rotations(view: View) -> list[SO3]:
    """Ways to hold the tool: as it is now, else upright or tilted, pointing away from the base."""
    away = view.place - view.robot.base_position
    yaw = float(np.arctan2(away[1], away[0]))
    return [view.tool.rotation(), *(make_pose((0, 0, 0), yaw, tilt).rotation() for tilt in TILTS)]


def _cube_yaws(cube: ObjectState) -> list[float]:
    """Headings of the cube's four sides, whichever face it lies on [rad]."""
    axes = SO3(np.asarray(cube.quaternion)).as_matrix()
    level = axes[:, np.argmin(abs(axes[2]))]
    yaw = np.arctan2(level[1], level[0])
    return [float((yaw + k * np.pi / 2 + np.pi) % (2 * np.pi) - np.pi) for k in range(4)]


def _turn_to_cube(view: View, cube: ObjectState) -> float:
    """Angle between the closing axis and the nearest side of the cube, seen from above [rad]."""
    closing = view.tool.rotation().as_matrix()[:, 1]
    difference = np.arctan2(closing[1], closing[0]) - _cube_yaws(cube)[0]
    return float(abs((difference + np.pi / 4) % (np.pi / 2) - np.pi / 4))


def _distance_from(view: View) -> Callable[[Pose], float]:
    return lambda pose: float(np.linalg.norm((view.tool.rotation().inverse() @ pose.rotation()).log()))


def _clear(view: View) -> list[Pose]:
    """Straight up first, when the tool is down among the objects."""
    if view.place[2] > HOVER:
        return []
    return [_moved(view.tool, np.array([*view.place[:2], HOVER + 0.02]))]


def _back(pose: Pose, distance: float) -> Pose:
    """`distance` back along the approach direction."""
    return _moved(pose, pose.translation() - distance * pose.rotation().as_matrix()[:, 2])


def _moved(pose: Pose, position: Vector) -> Pose:
    return Pose.from_rotation_and_translation(pose.rotation(), position)
