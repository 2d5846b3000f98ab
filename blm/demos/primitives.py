"""Task decomposition: which primitive is due in a measured state, and which tool poses would do it.

All are pure functions of the `View`, so the expert can take over in any state: after a missed grasp or a drop
nothing is held, so an approach is due again. Poses are as in the planner, positions in the world [m].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
GAP, FINGER = 0.02, 0.011
"""Free space between finger and cube before a push; half the thickness of a finger [m]."""
PUSH_NEAR, CARRY_NEAR = 0.03, 0.008
"""A push, a carry is over when the cube is this near its goal [m]."""
ON_SPOT = 0.012
"""The tool has arrived when it is this near [m]."""
MOVED = 0.008
"""A plan is given up when its object has moved by this [m]."""
ALIGNED = np.radians(10)
UP = np.array([0.0, 0.0, 1.0])
FAST, CAREFUL = 0.35, 0.20
"""Mean tool speeds in free space and near objects [m/s]."""
Path = tuple[Sequence[Pose], Sequence[Pose]]
"""Tool poses to go through in straight lines; those of the next primitive, which must be possible too."""


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
        return self.tool.translation()


@dataclass(frozen=True, kw_only=True)
class Step:
    """One primitive: what to command, and when it stops being the right thing to do."""

    primitive: str
    opening: float
    """Gripper command."""
    paths: Sequence[Path] = ()
    """Ranked candidates; none: stay where the arm was last sent."""
    free: bool = False
    """The way does not matter, so a motion in joint space will do where straight lines are not possible."""
    speed: float = CAREFUL
    valid: Callable[[View], bool] = lambda view: False
    """False: decide again at once."""


def pick(view: View) -> Step:
    """Grasp the cube and hold it at the goal."""
    cube, goal = view.objects["cube"], view.objects["goal"]
    return carry(view, cube, goal.position) if _in_hand(view, cube.name) else grasp(view, cube)


def push(view: View) -> Step:
    """Push the cube until it is well inside the target."""
    return push_towards(view, view.objects["cube"], view.objects["target"].position)


DECOMPOSITIONS: dict[str, Callable[[View], Step]] = {"pick_cube": pick, "push_cube": push}
"""Task -> what to do now. To teach the expert a task, add a function of the measured state."""


def grasp(view: View, cube: ObjectState) -> Step:
    """Hover above the cube with open fingers, close in, close the fingers; again when they missed it."""
    width = cube.size[1] / view.robot.gripper.stroke  # opening at which the fingers touch it
    x, y, z = view.tool.inverse() @ cube.position
    above = max(abs(x), abs(y)) < ON_SPOT and _turn_to(cube, view.tool.rotation()) < ALIGNED
    if above and abs(z) < ON_SPOT and view.opening > 0.8 * width:
        return Step(primitive="grasp", opening=0.0)
    turns = product(_headings(cube), TILTS)
    poses = _nearest(view, [make_pose(cube.position, yaw, tilt) for yaw, tilt in turns])
    if above and 0 < z < 1.5 * HOVER and view.opening > min(1.3 * width, 0.95):
        paths: list[Path] = [([pose], []) for pose in poses]
        return Step(primitive="descend", opening=1.0, paths=paths, valid=_unmoved(cube))
    back = [_at(pose, pose.translation() - HOVER * pose.rotation().as_matrix()[:, 2]) for pose in poses]
    paths = [([*_clear(view), hover], [pose]) for hover, pose in zip(back, poses, strict=True)]
    return _approach(1.0, paths, cube)


def carry(view: View, cube: ObjectState, goal: Vector) -> Step:
    """Bring the held cube to `goal`; it hangs in the hand where it was measured, not where it was planned."""
    offset = view.tool.inverse() @ cube.position
    away = view.place - view.robot.base_position
    yaw = float(np.arctan2(away[1], away[0]))
    turns = [view.tool.rotation(), *(make_pose(goal, yaw, tilt).rotation() for tilt in TILTS)]

    def to(point: Vector) -> list[Path]:
        return [([Pose.from_rotation_and_translation(r, point - r.apply(offset))], []) for r in turns]

    def held(now: View) -> bool:
        return _in_hand(now, cube.name)

    if np.linalg.norm(cube.position - goal) < CARRY_NEAR:
        return Step(primitive="hold", opening=0.0)
    if cube.position[2] < cube.size[2] + 0.03 and np.linalg.norm((cube.position - goal)[:2]) > 0.03:
        return Step(primitive="lift", opening=0.0, paths=to(cube.position + 0.05 * UP), valid=held)
    return Step(primitive="move", opening=0.0, paths=to(goal), valid=held, free=True, speed=FAST)


def push_towards(view: View, cube: ObjectState, goal: Vector) -> Step:
    """Go behind the cube with closed fingers and push it in a straight line to `goal`."""
    distance = float(np.linalg.norm((goal - cube.position)[:2]))
    if distance <= PUSH_NEAR:
        return Step(primitive="hold", opening=0.0)
    unit = (goal - cube.position)[:2] / distance
    contact = cube.size[0] + FINGER

    def at(along: float) -> Vector:
        return np.array([*(cube.position[:2] + along * unit), PUSH_HEIGHT])

    def offset(now: View) -> tuple[float, float]:
        """How far the tool is from the cube, along the push and to its side."""
        gap = (now.place - now.objects[cube.name].position)[:2]
        return float(gap @ unit), float(abs(gap[0] * unit[1] - gap[1] * unit[0]))

    def behind(now: View) -> bool:
        along, side = offset(now)
        return along < -0.8 * cube.size[0] and side < 1.25 * ON_SPOT

    stand, end = at(-contact - GAP), at(distance - PUSH_NEAR / 2 - contact)
    heading = np.arctan2(unit[1], unit[0]) + np.array([0, np.pi / 2])
    yaws = heading - np.pi * np.round(heading / np.pi)  # the closed fingers are the same from both sides
    poses = [make_pose(stand, yaw, tilt) for yaw, tilt in product(yaws, TILTS)]
    nearest = _nearest(view, poses)
    ready = view.opening < 0.15 and _turn(view.tool, nearest[0]) < ALIGNED
    low = abs(view.place[2] - PUSH_HEIGHT) < ON_SPOT
    if ready and low and behind(view) and offset(view)[0] > -contact - 2 * GAP:
        paths: list[Path] = [([_at(pose, end)], []) for pose in nearest]
        return Step(primitive="push", opening=0.0, paths=paths, valid=behind)
    if ready and np.linalg.norm((view.place - stand)[:2]) < ON_SPOT:
        paths = [([pose], []) for pose in nearest]
        return Step(primitive="descend", opening=0.0, paths=paths, valid=_unmoved(cube))
    above = stand + HOVER * UP
    paths = [([*_clear(view), _at(pose, above)], [pose, _at(pose, end)]) for pose in poses]
    return _approach(0.0, paths, cube)


def _approach(opening: float, paths: list[Path], thing: ObjectState) -> Step:
    valid = _unmoved(thing)
    return Step(primitive="approach", opening=opening, paths=paths, free=True, speed=FAST, valid=valid)


def _unmoved(thing: ObjectState) -> Callable[[View], bool]:
    return lambda now: bool(np.linalg.norm(now.objects[thing.name].position - thing.position) < MOVED)


def _in_hand(view: View, name: str) -> bool:
    """Whether a thing is grasped, or off the table at the tool: the measured grip can fail for an instant."""
    thing = view.objects[name]
    near = np.linalg.norm(thing.position - view.place) < thing.size[0]
    return bool(view.held(name) or (near and thing.position[2] > thing.size[2] + 0.005))


def _headings(cube: ObjectState) -> list[float]:
    """Headings of the cube's four sides, whichever face it lies on [rad]."""
    axes = SO3(np.asarray(cube.quaternion)).as_matrix()
    level = axes[:, np.argmin(abs(axes[2]))]
    return [float(np.arctan2(level[1], level[0]) + k * np.pi / 2) for k in range(4)]


def _turn_to(cube: ObjectState, tool: SO3) -> float:
    """Angle between the closing axis and the nearest side of the cube, seen from above [rad]."""
    closing = tool.as_matrix()[:, 1]
    difference = np.arctan2(closing[1], closing[0]) - _headings(cube)[0]
    return float(abs((difference + np.pi / 4) % (np.pi / 2) - np.pi / 4))


def _nearest(view: View, poses: Sequence[Pose]) -> list[Pose]:
    """The poses by how little the tool has to turn for them."""
    return sorted(poses, key=lambda pose: _turn(view.tool, pose))


def _turn(one: Pose, other: Pose) -> float:
    """Angle between two attitudes [rad]."""
    return float(np.linalg.norm((one.rotation().inverse() @ other.rotation()).log()))


def _clear(view: View) -> list[Pose]:
    """Straight up first, when the tool is down among the objects."""
    up = np.array([*view.place[:2], HOVER + 0.02])
    return [_at(view.tool, up)] if view.place[2] <= HOVER else []


def _at(pose: Pose, position: Vector) -> Pose:
    return Pose.from_rotation_and_translation(pose.rotation(), position)
