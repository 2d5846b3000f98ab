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

from blm.planner.arm_planner import Pose, Vector, make_pose
from blm.robots import RobotSpec
from blm.tasks import ObjectState
from blm.tasks.place_sphere import REST

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
LIFT = 0.05
"""How far a thing is lifted before it is carried, and above its place before it is put down [m]."""
ON_SPOT = 0.012
"""The tool has arrived when it is this near [m]."""
MOVED = 0.008
"""A plan is given up when its object has moved by this [m]."""
ALIGNED = np.radians(10)
UP = np.array([0.0, 0.0, 1.0])
FAST, CAREFUL, SLOW = 0.35, 0.20, 0.10
"""Mean tool speeds in free space, near objects, and when putting something down [m/s]."""
RELEASE_HEIGHT = 0.004
"""A thing is let go when it is this near its place [m]."""
CLEAR_OF = 0.03
"""A thing that was put down is left alone when the tool is this far away [m]."""
BALL_GRIP = 0.006
"""Height of the tool above a ball's centre when it grasps it [m]."""
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
    touches: tuple[str, ...] = ()
    """Items that the arm may touch on the way: the thing to be grasped or pushed."""
    carried: str = ""
    """Item in the hand: it moves with the tool and must not hit anything."""
    valid: Callable[[View], bool] = lambda view: False
    """False: decide again at once."""


def pick(view: View) -> Step:
    """Grasp the cube and hold it at the goal."""
    cube, goal = view.objects["cube"], view.objects["goal"].position
    if not _in_hand(view, cube):
        return grasp(view, cube)
    if np.linalg.norm(cube.position - goal) < CARRY_NEAR:
        return Step(primitive="hold", opening=0.0)
    return carry(view, cube, goal)


def push(view: View) -> Step:
    """Push the cube until it is well inside the target."""
    return push_towards(view, view.objects["cube"], view.objects["target"].position, "push")


def pull(view: View) -> Step:
    """The same with the target on this side: from behind the cube, towards the arm."""
    return push_towards(view, view.objects["cube"], view.objects["target"].position, "pull")


def stack(view: View) -> Step:
    """Put the cube on the lower one and let go."""
    cube, lower = view.objects["cube"], view.objects["lower"]
    return put(view, cube, lower, rise=cube.size[2] + lower.size[2], within=0.02)


def place(view: View) -> Step:
    """Put the ball into the bin and let go."""
    return put(view, view.objects["ball"], view.objects["bin"], rise=REST, within=0.005)


Stages = list[list[Pose]]
"""What the tool has to reach, in order; of each stage any one pose will do."""


def push_stages(view: View) -> Stages:
    """Before the cube, and at the end of the push."""
    cube, target = view.objects["cube"], view.objects["target"].position
    way = (target - cube.position)[:2]
    unit = way / np.linalg.norm(way)
    back = cube.size[0] + FINGER + GAP
    spots = cube.position[:2] - back * unit, target[:2] - (back + PUSH_NEAR / 2) * unit
    return [_push_poses(np.array([*spot, PUSH_HEIGHT]), unit) for spot in spots]


def carry_stages(view: View, thing: ObjectState, goal: Vector) -> Stages:
    """At the thing, and where it has to go, with any attitude."""
    away = goal - view.robot.base_position
    yaw = float(np.arctan2(away[1], away[0])) + np.radians(np.arange(0, 360, 30))
    poses = grasp_poses(view, thing)
    return [
        poses,
        [at_place(pose, goal) for pose in poses] + [make_pose(goal, y, t) for y, t in product(yaw, TILTS)],
    ]


def grasp(view: View, thing: ObjectState, goal: Vector | None = None) -> Step:
    """Hover above a cube or ball with open fingers, close in, close the fingers; again when they missed it.

    With a `goal`, attitudes of the tool that can carry the thing there unturned come first.
    """
    width = thing.size[0] / view.robot.gripper.stroke  # opening at which the fingers touch it
    spot = _grip_point(thing)
    x, y, z = view.tool.inverse() @ spot
    above = max(abs(x), abs(y)) < ON_SPOT and _turn_to(thing, view.tool.rotation()) < ALIGNED
    if above and abs(z) < ON_SPOT and view.opening > 0.8 * width:
        return Step(primitive="grasp", opening=0.0)
    poses = grasp_poses(view, thing)
    if above and 0 < z < 1.5 * HOVER and view.opening > min(1.3 * width, 0.95):
        down: list[Path] = [([pose], []) for pose in poses]
        valid = unmoved(thing)
        return Step(primitive="descend", opening=1.0, paths=down, valid=valid, touches=(thing.name,))
    up = [[*_clear(view), drawn_back(pose)] for pose in poses]
    paths = [(hover, [pose]) for hover, pose in zip(up, poses, strict=True)]
    if goal is not None:
        ends = [
            [pose, at_place(pose, spot + LIFT * UP), at_place(pose, goal - thing.position + spot)]
            for pose in poses
        ]
        paths = [*zip(up, ends, strict=True), *paths]
    return _approach(1.0, paths, thing)


def grasp_poses(view: View, thing: ObjectState) -> list[Pose]:
    """Ranked tool poses that grasp it: least turn of the tool first."""
    spot = _grip_point(thing)
    turns = product(_headings(thing), TILTS)
    return _nearest(view, [make_pose(spot, yaw, tilt) for yaw, tilt in turns])


def carry(view: View, thing: ObjectState, goal: Vector) -> Step:
    """Bring the held thing to `goal`; it hangs in the hand as measured, not as planned."""
    held = _still_held(thing)
    low = thing.position[2] < thing.size[0] + 0.03
    if low and np.linalg.norm((thing.position - goal)[:2]) > 0.03:
        paths = _carrying(view, thing, thing.position + LIFT * UP, _carry_turns(view, goal))
        return Step(primitive="lift", opening=0.0, paths=paths, valid=held, carried=thing.name)
    paths = _carrying(view, thing, goal, _carry_turns(view, goal))
    return Step(
        primitive="move", opening=0.0, paths=paths, valid=held, free=True, speed=FAST, carried=thing.name
    )


def put(view: View, thing: ObjectState, base: ObjectState, rise: float, within: float) -> Step:
    """Bring a thing to rest `rise` [m] above the centre of its base, let go and draw back.

    Seen from above, `within` [m] of it is near enough.
    """
    spot = base.position + rise * UP
    off = thing.position - spot
    sideways, away = float(np.linalg.norm(off[:2])), float(np.linalg.norm(view.place - thing.position))
    if sideways < within and abs(off[2]) < RELEASE_HEIGHT:
        width = thing.size[0] / view.robot.gripper.stroke
        if away < CLEAR_OF and view.opening < min(1.4 * width, 0.95):
            return Step(primitive="release", opening=1.0)
        if away < CLEAR_OF:
            back: list[Path] = [([drawn_back(view.tool, by)], []) for by in (HOVER, LIFT, 1.2 * CLEAR_OF)]
            touches = (thing.name, base.name)
            return Step(
                primitive="retreat",
                opening=1.0,
                paths=back,
                free=True,
                touches=touches,
                valid=lambda now: True,
            )
        return Step(primitive="hold" if thing.is_static else "retreat", opening=1.0)
    above = spot + LIFT * UP
    if not _in_hand(view, thing):
        return grasp(view, thing, above)
    if sideways > within / 2:
        return carry(view, thing, above)
    paths = _carrying(view, thing, spot + 0.5 * RELEASE_HEIGHT * UP, [view.tool.rotation()])
    held = _still_held(thing)
    return Step(
        primitive="place",
        opening=0.0,
        paths=paths,
        valid=held,
        speed=SLOW,
        carried=thing.name,
        touches=(base.name,),
    )


def push_towards(view: View, cube: ObjectState, goal: Vector, primitive: str) -> Step:
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
    poses = _push_poses(stand, unit)
    nearest = _nearest(view, poses)
    ready = view.opening < 0.15 and angle_between(view.tool, nearest[0]) < ALIGNED
    low = abs(view.place[2] - PUSH_HEIGHT) < ON_SPOT
    if ready and low and behind(view) and offset(view)[0] > -contact - 2 * GAP:
        paths: list[Path] = [([at_place(pose, end)], []) for pose in nearest]
        return Step(primitive=primitive, opening=0.0, paths=paths, valid=behind, touches=(cube.name,))
    if ready and np.linalg.norm((view.place - stand)[:2]) < ON_SPOT:
        paths = [([pose], []) for pose in nearest]
        valid = unmoved(cube)
        return Step(primitive="descend", opening=0.0, paths=paths, valid=valid, touches=(cube.name,))
    above = stand + HOVER * UP
    paths = [([*_clear(view), at_place(pose, above)], [pose, at_place(pose, end)]) for pose in poses]
    return _approach(0.0, paths, cube)


def _push_poses(point: Vector, unit: Vector) -> list[Pose]:
    """Tool poses at `point` for a push along `unit` [2]: the closed fingers are the same from both sides."""
    heading = np.arctan2(unit[1], unit[0]) + np.array([0, np.pi / 2])
    yaws = heading - np.pi * np.round(heading / np.pi)
    return [make_pose(point, yaw, tilt) for yaw, tilt in product(yaws, TILTS)]


def _approach(opening: float, paths: Sequence[Path], thing: ObjectState) -> Step:
    valid = unmoved(thing)
    return Step(primitive="approach", opening=opening, paths=paths, free=True, speed=FAST, valid=valid)


def _carry_turns(view: View, goal: Vector) -> list[SO3]:
    """Attitudes of the tool for carrying: as it is, then turned about the vertical: nothing tips over."""
    turns = np.radians((0, 30, -30, 60, -60, 90, -90, 135, -135, 180))
    kept = [SO3.from_z_radians(turn) @ view.tool.rotation() for turn in turns]
    away = goal - view.robot.base_position
    yaw = float(np.arctan2(away[1], away[0]))
    return kept + [make_pose(goal, yaw, tilt).rotation() for tilt in TILTS]


def _carrying(view: View, thing: ObjectState, point: Vector, turns: Sequence[SO3]) -> list[Path]:
    """Paths that bring the held thing to `point`, one for each attitude of the tool."""
    offset = view.tool.inverse() @ thing.position
    return [([Pose.from_rotation_and_translation(turn, point - turn.apply(offset))], []) for turn in turns]


def unmoved(thing: ObjectState) -> Callable[[View], bool]:
    """A test of later states: whether the thing is still where it is now."""
    return lambda now: bool(np.linalg.norm(now.objects[thing.name].position - thing.position) < MOVED)


def _in_hand(view: View, thing: ObjectState) -> bool:
    """Whether a thing is grasped, or off the table at the tool: the measured grip can fail for an instant."""
    near = np.linalg.norm(thing.position - view.place) < thing.size[0]
    return bool(view.held(thing.name) or (near and thing.position[2] > thing.size[0] + 0.005))


def _still_held(thing: ObjectState) -> Callable[[View], bool]:
    return lambda now: _in_hand(now, now.objects[thing.name])


def _grip_point(thing: ObjectState) -> Vector:
    """Where the tool grasps it: a ball a little above its centre, so that the fingers stay above the bin."""
    return thing.position + (BALL_GRIP * UP if thing.kind == "ball" else 0.0)


def _headings(thing: ObjectState) -> list[float]:
    """Headings of the cube's four sides, whichever face it lies on; any will do for a ball [rad]."""
    if thing.kind == "ball":
        return [float(turn) for turn in np.arange(8) * np.pi / 4]
    axes = SO3(np.asarray(thing.quaternion)).as_matrix()
    level = axes[:, np.argmin(abs(axes[2]))]
    return [float(np.arctan2(level[1], level[0]) + k * np.pi / 2) for k in range(4)]


def _turn_to(thing: ObjectState, tool: SO3) -> float:
    """Angle between the closing axis and the nearest side of the thing, seen from above [rad]."""
    if thing.kind == "ball":
        return 0.0
    closing = tool.as_matrix()[:, 1]
    difference = np.arctan2(closing[1], closing[0]) - _headings(thing)[0]
    return float(abs((difference + np.pi / 4) % (np.pi / 2) - np.pi / 4))


def drawn_back(pose: Pose, by: float = HOVER) -> Pose:
    """The pose so far [m] back along its approach direction."""
    return at_place(pose, pose.translation() - by * pose.rotation().as_matrix()[:, 2])


def _nearest(view: View, poses: Sequence[Pose]) -> list[Pose]:
    """The poses by how little the tool has to turn for them."""
    return sorted(poses, key=lambda pose: angle_between(view.tool, pose))


def angle_between(one: Pose, other: Pose) -> float:
    """Angle between two attitudes [rad]."""
    return float(np.linalg.norm((one.rotation().inverse() @ other.rotation()).log()))


def _clear(view: View) -> list[Pose]:
    """Straight up first, when the tool is down among the objects."""
    up = np.array([*view.place[:2], HOVER + 0.02])
    return [at_place(view.tool, up)] if view.place[2] <= HOVER else []


def at_place(pose: Pose, position: Vector) -> Pose:
    """The same attitude somewhere else."""
    return Pose.from_rotation_and_translation(pose.rotation(), position)
