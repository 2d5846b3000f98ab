"""Standing the lying peg on its end: grasp, lift, straighten, set down.

The peg rotates about the closing axis, because the fingers press so lightly that they carry its
weight but not its torque; it hangs and swings like a pendulum. The remaining lean is measured and
removed by rotating the tool with a firm grip. As in `primitives`, all functions are pure functions
of the `WorldState`. Lengths in m, angles in rad, world frame.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from mink import SO3

from blm.planner.arm_planner import Pose, Vector, make_pose
from blm.planner.primitives import (
    FAST,
    HOVER,
    ON_SPOT,
    UP,
    Candidate,
    KeyPoses,
    Primitive,
    WorldState,
    rotation_angle,
    standoff_pose,
    stays_in_place,
    straight_up_first,
    with_position,
)
from blm.robots import RobotSpec
from blm.tasks import ObjectState
from blm.tasks.lift_peg_upright import HALF_LENGTH, angle_from_vertical, half_length

NAME = "peg"
"""The item's name in the task."""
GRIP = 0.095
"""Distance of the grasp point from the centre of the plain suite's peg [m]."""
GENTLE = 0.018
"""How far inside the peg's side each finger is commanded to let the peg swing [m]."""
FIRM = 0.022
"""How far inside the peg's side each finger is commanded to hold the peg firmly [m]."""
TILTS = np.radians((20, 0, 40, -20, 60))
"""Tilts of the tool along the peg at the grasp, in the order of their success [rad]."""
SWING = np.radians(25)
"""Rotation that the tool may need to straighten the hanging peg [rad]."""
SLACK = 0.02
"""Free height under the hanging peg [m]."""
ROOM = 0.05
"""Extra height that must be reachable [m]: the grip slips, and the tool rises after the release."""
LOW = 0.004
"""The peg stands when its lowest point is this near the table [m]."""
PLUMB = 0.25
"""Lean below which the grip becomes firm [rad]."""
STRAIGHT = 0.04
"""Lean below which the peg is set down [rad]."""
STEADY = 0.12
"""Lean below which the peg stays upright when it is released [rad]."""
LYING = np.radians(80)
"""With less lean than this the peg may be falling, or leaning on the fingers [rad]."""
SWINGING = 0.5
"""Angular speed of the peg above which straightening waits [rad/s]."""
ROCKING = 0.1
"""Angular speed of the peg above which the arm waits before it holds still [rad/s]."""
LEAVE = 0.03
"""Height above the standing peg to which the tool retreats [m]."""


def lift_peg_upright(state: WorldState, *, named_end: bool = False) -> Primitive:
    """Stand the peg upright, release it and hold still above it.

    With `named_end`, the end that the instruction names must be up: the peg is gripped at that end,
    because it hangs from the grip.
    """
    peg = state.objects[NAME]
    ends = _ends(state, named_end)
    lean = _lean_angle(peg)
    on_foot = lean < STEADY and _lowest(peg) < LOW
    if _in_hand(state, peg) and not (on_foot and peg.spin < SWINGING):
        if np.sign(_in_peg(state, peg)[0]) not in ends:
            return Primitive(name="release", opening=1.0, touches=(NAME,))
        return _lift_and_straighten(state, peg, look_ahead=named_end)
    if on_foot or (lean < LYING and (peg.spin > ROCKING or _distance_past_end(state, peg) < LEAVE / 2)):
        return _release_and_retreat(state, peg)
    return _grasp(state, peg, ends)


def lift_peg_key_poses(state: WorldState, *, named_end: bool = False) -> KeyPoses:
    """Return the key poses: grasp, on the way up, peg hanging, peg straightened."""
    sequences = _grasp_sequences(state, state.objects[NAME], _ends(state, named_end))
    return [[sequence[index] for sequence in sequences] for index in range(len(sequences[0]))]


def _ends(state: WorldState, named_end: bool) -> tuple[int, ...]:
    """Return the ends that may be up, as signs along the peg's axis."""
    if not named_end:
        return (-1, 1)
    return (-1,) if NAME in state.swap else (1,)


def _grasp(state: WorldState, peg: ObjectState, ends: tuple[int, ...]) -> Primitive:
    """Approach one end with open fingers, descend, close lightly; again if the fingers missed."""
    places = [state.tool.inverse() @ (peg.position + end * _grip(peg) * _axis(peg)) for end in ends]
    x, y, z = min(places, key=lambda place: np.linalg.norm(place[:2]))
    sequences = _grasp_sequences(state, peg, ends)
    across = abs(state.tool.rotation().as_matrix()[:, 1] @ _axis(peg)) < 0.1
    over = max(abs(x), abs(y)) < ON_SPOT and across
    if over and abs(z) < ON_SPOT and state.opening > 0.8 * _opening(state.robot, peg, 0.0):
        return Primitive(
            name="grasp", opening=_opening(state.robot, peg, _squeeze(peg, GENTLE)), touches=(NAME,)
        )
    if over and 0 < z < 1.5 * HOVER and state.opening > 0.95:
        sequences.sort(key=lambda sequence: _pose_distance(state.tool, sequence[0]))
        return Primitive(
            name="descend",
            opening=1.0,
            candidates=[Candidate([grasp]) for grasp, *_ in sequences],
            touches=(NAME,),
            valid=stays_in_place(peg),
        )
    up_first = straight_up_first(state)
    return Primitive(
        name="approach",
        opening=1.0,
        candidates=[
            Candidate([*up_first, standoff_pose(grasp, HOVER)], [grasp, *rest]) for grasp, *rest in sequences
        ],
        free=True,
        speed=FAST,
        valid=stays_in_place(peg),
    )


def _lift_and_straighten(state: WorldState, peg: ObjectState, *, look_ahead: bool) -> Primitive:
    """Lift the peg until it hangs clear of the table, straighten it, set it down.

    With `look_ahead`, routes up that leave room to straighten the peg come first.
    """
    end = np.sign(_in_peg(state, peg)[0])
    axis = end * _axis(peg)  # from the foot to the grip
    lean = float(np.arccos(np.clip(axis[2], -1, 1)))
    lowest = _lowest(peg)
    height = half_length(peg) + abs(_in_peg(state, peg)[0])  # of the grip above the foot

    def held(later: WorldState) -> bool:
        peg = later.objects[NAME]
        return _in_hand(later, peg) and (_lean_angle(peg) > PLUMB) == (lean > PLUMB)

    def with_peg(
        name: str, grip: float, routes: list[list[Pose]], rigid: bool = True, roomy: bool = False
    ) -> Primitive:
        last = [[_straightened(route[-1], axis)] for route in routes] if roomy else []
        first = [Candidate(route, pose) for route, pose in zip(routes, last, strict=False)]
        return Primitive(
            name=name,
            opening=_opening(state.robot, peg, _squeeze(peg, grip)),
            candidates=[*first, *(Candidate(poses) for poses in routes)],
            touches=() if rigid else (NAME,),
            carried=NAME if rigid else "",
            valid=held,
        )

    if lean < STRAIGHT and peg.spin < SWINGING:
        down = with_position(state.tool, state.tool_position - (lowest - 0.001) * UP)
        return with_peg("place", FIRM, [[down]])
    hang = np.array([*state.tool_position[:2], height + SLACK])
    if lean < 1.0 and lowest > 0.5 * SLACK and peg.spin < SWINGING:
        turn = _rotation_between(axis, UP)
        rotations = [SO3.exp(share * turn) @ state.tool.rotation() for share in (1.0, 0.7, 0.4)]
        poses = [Pose.from_rotation_and_translation(rotation, hang) for rotation in rotations]
        return with_peg("turn", FIRM, [[pose] for pose in poses])
    straight, turned = _lift_routes(state.robot, state.tool, hang)
    rotated = [[pose] for pose in _rotated_about_closing_axis(state, hang)[1:]]
    routes = [straight[1:], *rotated, turned, turned[1:]]
    roomy = look_ahead and lean > STRAIGHT
    return with_peg("lift", GENTLE if lean > PLUMB else FIRM, routes, rigid=False, roomy=roomy)


def _straightened(tool: Pose, axis: Vector) -> Pose:
    """Return the pose of a tool that has straightened the peg with this axis (foot to grip, [3])."""
    sideways = np.cross(axis, UP)
    turn = SO3.exp(SWING * sideways / max(float(np.linalg.norm(sideways)), 1e-9))
    return Pose.from_rotation_and_translation(turn @ tool.rotation(), tool.translation())


def _release_and_retreat(state: WorldState, peg: ObjectState) -> Primitive:
    """Open the gripper, move up, and hold still once the peg is still."""
    above = _distance_past_end(state, peg)
    around = state.opening > _opening(state.robot, peg, 0.003)  # fingers that stand on the peg cannot open
    if above < 0.01 and around and state.opening < 0.95:
        return Primitive(name="release", opening=1.0, touches=(NAME,))
    if above < LEAVE / 2:
        targets = [state.tool_position + (height - above) * UP for height in (LEAVE, 0.7 * LEAVE)]
        return Primitive(
            name="retreat",
            opening=1.0,
            candidates=[
                Candidate([pose]) for target in targets for pose in _rotated_about_closing_axis(state, target)
            ],
            touches=(NAME,),
            valid=lambda later: True,
        )
    at_rest = peg.spin < ROCKING and _lean_angle(peg) < STRAIGHT
    return Primitive(name="hold" if at_rest else "retreat", opening=1.0)


def _grasp_sequences(state: WorldState, peg: ObjectState, ends: tuple[int, ...]) -> list[list[Pose]]:
    """Return sequences of poses (grasp, on the way up, hanging, straightened), the best first."""
    axis = _axis(peg)
    if axis[:2] @ (peg.position - state.robot.base_position)[:2] < 0:
        axis = -axis
        ends = tuple(-end for end in reversed(ends))
    heading = np.arctan2(axis[1], axis[0])
    sequences = []
    for route, flip, tilt, end in product((0, 1), (1, -1), TILTS, ends):
        spot = peg.position + end * _grip(peg) * axis
        yaw = heading if flip == 1 else heading - np.pi
        grasp = make_pose([*spot[:2], max(spot[2], peg.size[1])], yaw, tilt)
        hang = np.array([*spot[:2], half_length(peg) + _grip(peg) + ROOM])
        up = _lift_routes(state.robot, grasp, hang)[route]
        # The tool's x axis runs along the peg; gripped at that end, the tool must tilt more to straighten it.
        straight = SO3.from_y_radians(end * flip * SWING)
        stand = Pose.from_rotation_and_translation(up[-1].rotation() @ straight, hang)
        sequences.append([grasp, *up, stand])
    return sequences


def _lift_routes(robot: RobotSpec, tool: Pose, hang: Vector) -> list[list[Pose]]:
    """Return two routes of the tool up to `hang` [3].

    The first keeps the orientation. The second rotates the tool, once the peg is up, to point away
    from the base: at that height a short arm cannot point its tool down, but can tilt it forward.
    """
    away = hang - robot.base_position
    mid = np.array([*hang[:2], 0.6 * hang[2]])
    forward = make_pose(hang, float(np.arctan2(away[1], away[0])), np.radians(35))
    return [[with_position(tool, mid), with_position(tool, hang)], [with_position(tool, mid), forward]]


def _in_peg(state: WorldState, peg: ObjectState) -> Vector:
    """Return the tool's offset from the peg's centre [3]: along the peg, closing axis, across."""
    offset = state.tool_position - peg.position
    axis = _axis(peg)
    closing = state.tool.rotation().as_matrix()[:, 1]
    closing = closing - closing @ axis * axis
    closing = closing / max(float(np.linalg.norm(closing)), 1e-9)
    return np.array([offset @ axis, offset @ closing, abs(offset @ np.cross(axis, closing))])


def _rotated_about_closing_axis(state: WorldState, place: Vector) -> list[Pose]:
    """Return tool poses at `place` [3] rotated about the closing axis."""
    turns = [state.tool.rotation() @ SO3.from_y_radians(turn) for turn in np.radians((0, 20, -20, 40, -40))]
    return [Pose.from_rotation_and_translation(turn, place) for turn in turns]


def _distance_past_end(state: WorldState, peg: ObjectState) -> float:
    """Return the distance of the tool past the peg's end [m].

    Infinite if it is far from the peg's axis.
    """
    along, side, height = _in_peg(state, peg)
    return float(abs(along) - half_length(peg)) if max(abs(side), height) < 0.08 else np.inf


def _in_hand(state: WorldState, peg: ObjectState) -> bool:
    """Whether the fingers have closed on the peg.

    Positions are used, because the contact force vanishes for instants while the peg swings.
    """
    along, side, height = _in_peg(state, peg)
    between = abs(along) < half_length(peg) + 0.008 and max(abs(side), height) < peg.size[1]
    return bool(between and state.opening < _opening(state.robot, peg, -0.004))


def _axis(peg: ObjectState) -> Vector:
    return SO3(np.asarray(peg.quaternion)).as_matrix()[:, 0]


def _grip(peg: ObjectState) -> float:
    """Return the distance of the grasp point from the peg's centre [m]."""
    return GRIP * _scale(peg)


def _squeeze(peg: ObjectState, depth: float) -> float:
    """Return the commanded depth [m] whose force relates to the peg's weight as in the plain suite."""
    return depth * _scale(peg) ** 3


def _scale(peg: ObjectState) -> float:
    """Return the size of the peg relative to that of the plain suite."""
    return half_length(peg) / HALF_LENGTH


def _lean_angle(peg: ObjectState) -> float:
    return angle_from_vertical(_axis(peg))


def _lowest(peg: ObjectState) -> float:
    """Return the height of the peg's lowest corner [m]."""
    half = np.array([half_length(peg), peg.size[1], peg.size[1]])
    return float(peg.position[2] - abs(SO3(np.asarray(peg.quaternion)).as_matrix()[2]) @ half)


def _rotation_between(one: Vector, other: Vector) -> Vector:
    """Return the smallest rotation vector [3] that rotates unit vector `one` onto `other`."""
    normal = np.cross(one, other)
    sine = float(np.linalg.norm(normal))
    return np.asarray(normal / max(sine, 1e-9) * np.arctan2(sine, one @ other))


def _opening(robot: RobotSpec, peg: ObjectState, inside: float) -> float:
    """Return the gripper command that sends each finger `inside` [m] the peg's side."""
    return float(np.clip((peg.size[1] - inside) / robot.gripper.stroke, 0.0, 1.0))


def _pose_distance(one: Pose, other: Pose) -> float:
    """Return the distance between two poses [m], where 1 rad counts as 0.2 m."""
    distance = np.linalg.norm(one.translation() - other.translation())
    return float(distance + 0.2 * rotation_angle(one, other))
