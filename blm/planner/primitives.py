"""Motion primitives: which one is due in a measured state, and which tool poses achieve it.

`blm.planner.decompositions` composes them into tasks. All functions are pure functions of the
`WorldState`, so the expert can take over in any state: after a missed grasp or a drop nothing is
held, and therefore an approach is due again. Poses follow the conventions of
`blm.planner.arm_planner`; positions are in the world frame [m].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import numpy as np
from mink import SO3

from blm.planner.arm_planner import Pose, Vector, make_pose
from blm.robots import RobotSpec
from blm.tasks import ObjectState

TILTS = np.radians((0, 20, 40, 60))
"""Tilts of the tool that are tried [rad]: a short arm reaches further with a tilted tool."""
HOVER = 0.08
"""Standoff distance from which the tool closes in on an object [m]."""
PUSH_HEIGHT = 0.03
"""Height of the tool while it pushes [m]; lower, the fingers rub on the table and stall."""
GAP = 0.02
"""Free space between finger and cube before a push [m]."""
FINGER = 0.011
"""Half the thickness of a finger [m]."""
PUSH_NEAR = 0.03
"""A push ends when the cube is this near its goal [m]."""
CARRY_NEAR = 0.008
"""A carry ends when the cube is this near its goal [m]."""
LIFT = 0.05
"""Height of an object above the table before a carry, and above its place after it [m]."""
ON_SPOT = 0.012
"""The tool has arrived when it is this near its target [m]."""
MOVED = 0.008
"""A plan becomes invalid when its object has moved by this distance [m]."""
ALIGNED = np.radians(10)
"""The tool is aligned with an object within this angle [rad]."""
UP = np.array([0.0, 0.0, 1.0])
"""Vertical unit vector of the world frame."""
FAST = 0.35
"""Mean tool speed in free space [m/s]."""
CAREFUL = 0.20
"""Mean tool speed near objects [m/s]."""
SLOW = 0.10
"""Mean tool speed when an object is put down [m/s]."""
RELEASE_HEIGHT = 0.004
"""An object is released when it is this near its resting place [m]."""
CLEAR_OF = 0.03
"""The retreat ends when the tool is this far from the released object [m]."""
BALL_GRIP = 0.006
"""Height of the grasp pose above a ball's centre [m]."""


class Candidate(NamedTuple):
    """One way to carry out a primitive, as tool poses that are connected by straight lines."""

    poses: Sequence[Pose]
    """Waypoints of this primitive."""
    next_poses: Sequence[Pose] = ()
    """Waypoints of the next primitive, which must be feasible too."""


@dataclass(frozen=True)
class WorldState:
    """The measured state of the arm and the scene, from which the expert decides."""

    robot: RobotSpec
    tool: Pose
    opening: float
    """Gripper opening: 0 closed .. 1 open."""
    objects: dict[str, ObjectState]
    held: Callable[[str], bool]
    """Whether both fingers press on the named object."""
    swap: Mapping[str, str] = field(default_factory=dict)
    """Item of the task -> the item in its place, if the instruction names the other thing."""

    def item(self, name: str) -> ObjectState:
        """Return the object that has the part of this item in the present instruction."""
        return self.objects[self.swap.get(name, name)]

    @property
    def tool_position(self) -> Vector:
        """Position of the tool centre point [3]."""
        return self.tool.translation()


@dataclass(frozen=True, kw_only=True)
class Primitive:
    """A motion primitive: its candidate tool poses, and when it becomes invalid."""

    name: str
    opening: float
    """Gripper command: 0 closed .. 1 open."""
    candidates: Sequence[Candidate] = ()
    """Ranked candidates; if empty, the arm stays at its last target."""
    free: bool = False
    """Whether any path will do: joint-space motions are used where straight lines are infeasible."""
    speed: float = CAREFUL
    """Mean tool speed [m/s]."""
    touches: tuple[str, ...] = ()
    """Items that the arm may touch: the object to be grasped or pushed."""
    carried: str = ""
    """Item in the hand; it moves with the tool and must not collide."""
    valid: Callable[[WorldState], bool] = lambda state: False
    """Whether the primitive is still right in a later state; if not, the expert decides again."""


KeyPoses = list[list[Pose]]
"""Key poses that the tool must reach, in order; each is a list of interchangeable candidates."""


def push_key_poses(state: WorldState, cube: ObjectState, target: Vector) -> KeyPoses:
    """Return the key poses of a push to `target` [3]: behind the cube, and at the end of the push."""
    displacement = (target - cube.position)[:2]
    unit = displacement / np.linalg.norm(displacement)
    back = cube.size[0] + FINGER + GAP
    spots = cube.position[:2] - back * unit, target[:2] - (back + PUSH_NEAR / 2) * unit
    return [_push_poses(np.array([*spot, PUSH_HEIGHT]), unit) for spot in spots]


def carry_key_poses(state: WorldState, thing: ObjectState, goal: Vector) -> KeyPoses:
    """Return the key poses of a carry: the grasp, and the goal with any orientation."""
    away = goal - state.robot.base_position
    yaws = float(np.arctan2(away[1], away[0])) + np.radians(np.arange(0, 360, 30))
    grasps = grasp_poses(state, thing)
    at_goal = [with_position(pose, goal) for pose in grasps]
    at_goal += [make_pose(goal, yaw, tilt) for yaw, tilt in product(yaws, TILTS)]
    return [grasps, at_goal]


def grasp(state: WorldState, thing: ObjectState, goal: Vector | None = None) -> Primitive:
    """Approach a cube or ball with open fingers, descend, close; again if the fingers missed it.

    With a `goal` [3], grasp poses that can carry the object there without reorientation come first.
    """
    width = thing.size[0] / state.robot.gripper.stroke  # opening at which the fingers touch the object
    spot = _grasp_point(thing)
    x, y, z = state.tool.inverse() @ spot
    above = max(abs(x), abs(y)) < ON_SPOT and _misalignment(thing, state.tool.rotation()) < ALIGNED
    if above and abs(z) < ON_SPOT and state.opening > 0.8 * width:
        return Primitive(name="grasp", opening=0.0)
    poses = grasp_poses(state, thing)
    if above and 0 < z < 1.5 * HOVER and state.opening > min(1.3 * width, 0.95):
        return Primitive(
            name="descend",
            opening=1.0,
            candidates=[Candidate([pose]) for pose in poses],
            valid=stays_in_place(thing),
            touches=(thing.name,),
        )
    approaches = [[*straight_up_first(state), standoff_pose(pose)] for pose in poses]
    candidates = [Candidate(approach, [pose]) for approach, pose in zip(approaches, poses, strict=True)]
    if goal is not None:
        carries = [
            [pose, with_position(pose, spot + LIFT * UP), with_position(pose, goal - thing.position + spot)]
            for pose in poses
        ]
        candidates = [*map(Candidate, approaches, carries), *candidates]
    return _approach(1.0, candidates, thing)


def grasp_poses(state: WorldState, thing: ObjectState) -> list[Pose]:
    """Return the grasp poses of an object; those that need the least tool rotation come first."""
    spot = _grasp_point(thing)
    angles = product(_headings(thing), TILTS)
    return _least_rotation_first(state, [make_pose(spot, yaw, tilt) for yaw, tilt in angles])


def carry(state: WorldState, thing: ObjectState, goal: Vector) -> Primitive:
    """Carry the held object to `goal` [3]; its pose in the hand is the measured one."""
    held = _stays_in_hand(thing)
    low = thing.position[2] < thing.size[0] + 0.03
    orientations = _carry_orientations(state, goal)
    if low and np.linalg.norm((thing.position - goal)[:2]) > 0.03:
        candidates = _carry_candidates(state, thing, thing.position + LIFT * UP, orientations)
        return Primitive(name="lift", opening=0.0, candidates=candidates, valid=held, carried=thing.name)
    return Primitive(
        name="move",
        opening=0.0,
        candidates=_carry_candidates(state, thing, goal, orientations),
        valid=held,
        free=True,
        speed=FAST,
        carried=thing.name,
    )


def place_on(
    state: WorldState, thing: ObjectState, base: ObjectState, rise: float, within: float
) -> Primitive:
    """Place an object `rise` [m] above the centre of its base, release it and retreat.

    `within` [m] is the horizontal tolerance.
    """
    spot = base.position + rise * UP
    offset = thing.position - spot
    sideways = float(np.linalg.norm(offset[:2]))
    away = float(np.linalg.norm(state.tool_position - thing.position))
    if sideways < within and abs(offset[2]) < RELEASE_HEIGHT:
        width = thing.size[0] / state.robot.gripper.stroke
        if away < CLEAR_OF and state.opening < min(1.4 * width, 0.95):
            return Primitive(name="release", opening=1.0)
        if away < CLEAR_OF:
            distances = (HOVER, LIFT, 1.2 * CLEAR_OF)
            return Primitive(
                name="retreat",
                opening=1.0,
                candidates=[Candidate([standoff_pose(state.tool, distance)]) for distance in distances],
                free=True,
                touches=(thing.name, base.name),
                valid=lambda later: True,
            )
        return Primitive(name="hold" if thing.is_static else "retreat", opening=1.0)
    above = spot + LIFT * UP
    if not in_hand(state, thing):
        return grasp(state, thing, above)
    if sideways > within / 2:
        return carry(state, thing, above)
    release_point = spot + 0.5 * RELEASE_HEIGHT * UP
    return Primitive(
        name="place",
        opening=0.0,
        candidates=_carry_candidates(state, thing, release_point, [state.tool.rotation()]),
        valid=_stays_in_hand(thing),
        speed=SLOW,
        carried=thing.name,
        touches=(base.name,),
    )


def push_towards(state: WorldState, cube: ObjectState, goal: Vector, name: str) -> Primitive:
    """Move the closed fingers behind the cube and push it in a straight line to `goal` [3]."""
    distance = float(np.linalg.norm((goal - cube.position)[:2]))
    if distance <= PUSH_NEAR:
        return Primitive(name="hold", opening=0.0)
    unit = (goal - cube.position)[:2] / distance
    contact = cube.size[0] + FINGER

    def at(along: float) -> Vector:
        return np.array([*(cube.position[:2] + along * unit), PUSH_HEIGHT])

    def offset(later: WorldState) -> tuple[float, float]:
        """Distance of the tool from the cube, along the push (signed) and to its side."""
        gap = (later.tool_position - later.objects[cube.name].position)[:2]
        return float(gap @ unit), float(abs(gap[0] * unit[1] - gap[1] * unit[0]))

    def behind(later: WorldState) -> bool:
        along, side = offset(later)
        return along < -0.8 * cube.size[0] and side < 1.25 * ON_SPOT

    start = at(-contact - GAP)
    end = at(distance - PUSH_NEAR / 2 - contact)
    poses = _push_poses(start, unit)
    nearest = _least_rotation_first(state, poses)
    ready = state.opening < 0.15 and rotation_angle(state.tool, nearest[0]) < ALIGNED
    low = abs(state.tool_position[2] - PUSH_HEIGHT) < ON_SPOT
    if ready and low and behind(state) and offset(state)[0] > -contact - 2 * GAP:
        candidates = [Candidate([with_position(pose, end)]) for pose in nearest]
        return Primitive(name=name, opening=0.0, candidates=candidates, valid=behind, touches=(cube.name,))
    if ready and np.linalg.norm((state.tool_position - start)[:2]) < ON_SPOT:
        return Primitive(
            name="descend",
            opening=0.0,
            candidates=[Candidate([pose]) for pose in nearest],
            valid=stays_in_place(cube),
            touches=(cube.name,),
        )
    above = start + HOVER * UP
    candidates = [
        Candidate([*straight_up_first(state), with_position(pose, above)], [pose, with_position(pose, end)])
        for pose in poses
    ]
    return _approach(0.0, candidates, cube)


def _push_poses(point: Vector, unit: Vector) -> list[Pose]:
    """Return tool poses at `point` [3] for a push along `unit` [2].

    Closed fingers are symmetric, so of two opposite yaws the smaller one is used.
    """
    heading = np.arctan2(unit[1], unit[0]) + np.array([0, np.pi / 2])
    yaws = heading - np.pi * np.round(heading / np.pi)
    return [make_pose(point, yaw, tilt) for yaw, tilt in product(yaws, TILTS)]


def _approach(opening: float, candidates: Sequence[Candidate], thing: ObjectState) -> Primitive:
    return Primitive(
        name="approach",
        opening=opening,
        candidates=candidates,
        free=True,
        speed=FAST,
        valid=stays_in_place(thing),
    )


def _carry_orientations(state: WorldState, goal: Vector) -> list[SO3]:
    """Return tool orientations for a carry.

    The present orientation and its rotations about the vertical, which do not tip the object, come
    first; then the orientations that face the goal.
    """
    turns = np.radians((0, 30, -30, 60, -60, 90, -90, 135, -135, 180))
    kept = [SO3.from_z_radians(turn) @ state.tool.rotation() for turn in turns]
    away = goal - state.robot.base_position
    yaw = float(np.arctan2(away[1], away[0]))
    return kept + [make_pose(goal, yaw, tilt).rotation() for tilt in TILTS]


def _carry_candidates(
    state: WorldState, thing: ObjectState, point: Vector, orientations: Sequence[SO3]
) -> list[Candidate]:
    """Return one candidate per tool orientation that brings the held object to `point` [3]."""
    offset = state.tool.inverse() @ thing.position
    return [
        Candidate([Pose.from_rotation_and_translation(rotation, point - rotation.apply(offset))])
        for rotation in orientations
    ]


def stays_in_place(thing: ObjectState) -> Callable[[WorldState], bool]:
    """Return a check of later states: whether the object has not moved by more than MOVED."""
    return lambda later: bool(np.linalg.norm(later.objects[thing.name].position - thing.position) < MOVED)


def in_hand(state: WorldState, thing: ObjectState) -> bool:
    """Whether an object is grasped, or lifted off the table at the tool.

    The second case covers instants at which the contact forces of a grasp vanish.
    """
    near = np.linalg.norm(thing.position - state.tool_position) < thing.size[0]
    return bool(state.held(thing.name) or (near and thing.position[2] > thing.size[0] + 0.005))


def _stays_in_hand(thing: ObjectState) -> Callable[[WorldState], bool]:
    return lambda later: in_hand(later, later.objects[thing.name])


def _grasp_point(thing: ObjectState) -> Vector:
    """Return the tool position of a grasp [3].

    A ball is grasped slightly above its centre, so that the fingers stay above the bin.
    """
    return thing.position + (BALL_GRIP * UP if thing.kind == "ball" else 0.0)


def _headings(thing: ObjectState) -> list[float]:
    """Return the yaws of the cube's four sides, whichever face it lies on; for a ball, any [rad]."""
    if thing.kind == "ball":
        return [float(turn) for turn in np.arange(8) * np.pi / 4]
    axes = SO3(np.asarray(thing.quaternion)).as_matrix()
    level = axes[:, np.argmin(abs(axes[2]))]
    return [float(np.arctan2(level[1], level[0]) + k * np.pi / 2) for k in range(4)]


def _misalignment(thing: ObjectState, tool: SO3) -> float:
    """Return the angle between the closing axis and the nearest side of the object, in plan [rad]."""
    if thing.kind == "ball":
        return 0.0
    closing = tool.as_matrix()[:, 1]
    difference = np.arctan2(closing[1], closing[0]) - _headings(thing)[0]
    return float(abs((difference + np.pi / 4) % (np.pi / 2) - np.pi / 4))


def standoff_pose(pose: Pose, distance: float = HOVER) -> Pose:
    """Return the pose `distance` [m] back along the approach direction (pre-grasp, retreat)."""
    return with_position(pose, pose.translation() - distance * pose.rotation().as_matrix()[:, 2])


def _least_rotation_first(state: WorldState, poses: Sequence[Pose]) -> list[Pose]:
    return sorted(poses, key=lambda pose: rotation_angle(state.tool, pose))


def rotation_angle(one: Pose, other: Pose) -> float:
    """Return the angle of the rotation from one orientation to the other [rad]."""
    return float(np.linalg.norm((one.rotation().inverse() @ other.rotation()).log()))


def straight_up_first(state: WorldState) -> list[Pose]:
    """Return a waypoint straight above the tool if the tool is down among the objects."""
    up = np.array([*state.tool_position[:2], HOVER + 0.02])
    return [with_position(state.tool, up)] if state.tool_position[2] <= HOVER else []


def with_position(pose: Pose, position: Vector) -> Pose:
    """Return the same orientation at another position [3]."""
    return Pose.from_rotation_and_translation(pose.rotation(), position)
