"""How to stand the lying peg on its end: grip it gently near one end and lift, it swings plumb; set it down.

The peg turns about the closing axis because the fingers press so lightly that they carry its weight but not
its torque. What lean is left then is measured and taken out by turning the tool with a firm grip. As in
`primitives`, all are pure functions of the `View`. Lengths in m, angles in rad, world frame.
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
    Path,
    Step,
    View,
    angle_between,
    at_place,
    drawn_back,
    unmoved,
)
from blm.robots import RobotSpec
from blm.tasks import ObjectState
from blm.tasks.lift_peg_upright import HALF_LENGTH, HALF_WIDTH
from blm.tasks.lift_peg_upright import lean as lean_of

NAME = "peg"
GRIP = 0.095
"""Distance of the grip from the peg's centre."""
GENTLE, FIRM = 0.018, 0.022
"""How far inside the peg's side each finger is sent to let it swing, to hold it."""
TILTS = np.radians((20, 0, 40, -20, 60))
"""Lean of the tool when it grasps, along the peg, the likeliest to do first."""
SWING = np.radians(25)
"""By how much the tool may have to turn to straighten the peg that hangs."""
SLACK, ROOM = 0.02, 0.05
"""Free height under the hanging peg; height that must be in reach, for the grip slips, and goes up after."""
LOW = 0.004
"""The peg stands when its lowest point is this near the table."""
PLUMB, STRAIGHT, STEADY = 0.25, 0.04, 0.12
"""Lean at which the grip gets firm, at which the peg is put down, at which it stays up when let go."""
LYING = np.radians(80)
"""With less lean than this the peg may be falling, or leaning on the fingers."""
SWINGING, ROCKING = 0.5, 0.1
"""Angular speed of the peg [rad/s] above which to wait before it is straightened, before holding still."""
LEAVE = 0.03
"""How far above the standing peg the tool goes."""


def lift_peg(view: View) -> Step:
    """Stand the peg upright, let go and hold still beside it."""
    peg = view.objects[NAME]
    lean = _lean(peg)
    on_foot = lean < STEADY and _lowest(peg) < LOW
    if _in_hand(view, peg) and not (on_foot and peg.spin < SWINGING):
        return _raise(view, peg)
    if on_foot or (lean < LYING and (peg.spin > ROCKING or _above(view, peg) < LEAVE / 2)):
        return _leave(view, peg)
    return _grasp(view, peg)


def lift_peg_key_poses(view: View) -> list[list[Pose]]:
    """Tool poses at the grasp, on the way up, with the peg hanging, straightened: each stage's candidates."""
    chains = _chains(view, view.objects[NAME])
    return [[chain[stage] for chain in chains] for stage in range(len(chains[0]))]


def _grasp(view: View, peg: ObjectState) -> Step:
    """Hover above one end with open fingers, close in, close the fingers lightly; again when they missed."""
    ends = [view.tool.inverse() @ (peg.position + end * GRIP * _axis(peg)) for end in (-1, 1)]
    x, y, z = min(ends, key=lambda place: np.linalg.norm(place[:2]))
    chains = _chains(view, peg)
    across = abs(view.tool.rotation().as_matrix()[:, 1] @ _axis(peg)) < 0.1
    over = max(abs(x), abs(y)) < ON_SPOT and across
    if over and abs(z) < ON_SPOT and view.opening > 0.8 * _opening(view.robot, 0.0):
        return Step(primitive="grasp", opening=_opening(view.robot, GENTLE), touches=(NAME,))
    if over and 0 < z < 1.5 * HOVER and view.opening > 0.95:
        chains.sort(key=lambda chain: _far(view.tool, chain[0]))
        paths: list[Path] = [([chain[0]], []) for chain in chains]
        return Step(primitive="descend", opening=1.0, paths=paths, touches=(NAME,), valid=unmoved(peg))
    clear = [at_place(view.tool, np.array([*view.place[:2], HOVER + 0.02]))] if view.place[2] <= HOVER else []
    paths = [([*clear, drawn_back(grasp, HOVER)], [grasp, *rest]) for grasp, *rest in chains]
    return Step(primitive="approach", opening=1.0, paths=paths, free=True, speed=FAST, valid=unmoved(peg))


def _raise(view: View, peg: ObjectState) -> Step:
    """Lift until the peg hangs clear of the table, straighten it, put it down."""
    end = np.sign(_in_peg(view, peg)[0])
    axis = end * _axis(peg)  # from the foot to the grip
    lean, lowest = float(np.arccos(np.clip(axis[2], -1, 1))), _lowest(peg)
    height = HALF_LENGTH + abs(_in_peg(view, peg)[0])  # of the grip above the foot

    def held(now: View) -> bool:
        peg = now.objects[NAME]
        return _in_hand(now, peg) and (_lean(peg) > PLUMB) == (lean > PLUMB)

    def step(primitive: str, grip: float, ways: list[list[Pose]], rigid: bool = True) -> Step:
        return Step(
            primitive=primitive,
            opening=_opening(view.robot, grip),
            paths=[(way, []) for way in ways],
            touches=() if rigid else (NAME,),
            carried=NAME if rigid else "",
            valid=held,
        )

    if lean < STRAIGHT and peg.spin < SWINGING:
        return step("place", FIRM, [[at_place(view.tool, view.place - (lowest - 0.001) * UP)]])
    hang = np.array([*view.place[:2], height + SLACK])
    if lean < 1.0 and lowest > 0.5 * SLACK and peg.spin < SWINGING:
        turn = _onto(axis, UP)
        shares = [SO3.exp(share * turn) @ view.tool.rotation() for share in (1.0, 0.7, 0.4)]
        return step("turn", FIRM, [[Pose.from_rotation_and_translation(share, hang)] for share in shares])
    straight, turned = _ways_up(view.robot, view.tool, hang)
    ways = [straight[1:], *([pose] for pose in _turned(view, hang)[1:]), turned, turned[1:]]
    return step("lift", GENTLE if lean > PLUMB else FIRM, ways, rigid=False)


def _leave(view: View, peg: ObjectState) -> Step:
    """Open, go up, hold still when the peg does."""
    above = _above(view, peg)
    around = view.opening > _opening(view.robot, 0.003)  # fingers that stand on the peg cannot open
    if above < 0.01 and around and view.opening < 0.95:
        return Step(primitive="release", opening=1.0, touches=(NAME,))
    if above < LEAVE / 2:
        rises = LEAVE - above, 0.7 * LEAVE - above
        paths: list[Path] = [([pose], []) for up in rises for pose in _turned(view, view.place + up * UP)]
        return Step(primitive="retreat", opening=1.0, paths=paths, touches=(NAME,), valid=lambda now: True)
    settled = peg.spin < ROCKING and _lean(peg) < STRAIGHT
    return Step(primitive="hold" if settled else "retreat", opening=1.0)


def _chains(view: View, peg: ObjectState) -> list[list[Pose]]:
    """Poses at the grasp, on the way up, hanging, straightened: best first."""
    axis = _axis(peg)
    if axis[:2] @ (peg.position - view.robot.base_position)[:2] < 0:
        axis = -axis
    heading = np.arctan2(axis[1], axis[0])
    chains = []
    for way, flip, tilt, end in product((0, 1), (1, -1), TILTS, (-1, 1)):
        spot = peg.position + end * GRIP * axis
        yaw = heading if flip == 1 else heading - np.pi
        grasp = make_pose([*spot[:2], max(spot[2], HALF_WIDTH)], yaw, tilt)
        hang = np.array([*spot[:2], HALF_LENGTH + GRIP + ROOM])
        up = _ways_up(view.robot, grasp, hang)[way]
        # the tool's x runs along the peg: gripped at that end, the tool has to lean more to straighten it
        straight = SO3.from_y_radians(end * flip * SWING)
        stand = Pose.from_rotation_and_translation(up[-1].rotation() @ straight, hang)
        chains.append([grasp, *up, stand])
    return chains


def _ways_up(robot: RobotSpec, tool: Pose, hang: Vector) -> list[list[Pose]]:
    """How to bring the tool up to `hang`: as it is; turned, once the peg is up, to face away from the base.

    A short arm cannot point its tool down so high up, but can lean it forward.
    """
    away = hang - robot.base_position
    mid = np.array([*hang[:2], 0.6 * hang[2]])
    forward = make_pose(hang, float(np.arctan2(away[1], away[0])), np.radians(35))
    return [[at_place(tool, mid), at_place(tool, hang)], [at_place(tool, mid), forward]]


def _in_peg(view: View, peg: ObjectState) -> Vector:
    """Offset of the tool from the peg's centre: along the peg, along the closing axis, across both."""
    offset = view.place - peg.position
    axis = _axis(peg)
    closing = view.tool.rotation().as_matrix()[:, 1]
    closing = closing - closing @ axis * axis
    closing = closing / max(float(np.linalg.norm(closing)), 1e-9)
    return np.array([offset @ axis, offset @ closing, abs(offset @ np.cross(axis, closing))])


def _turned(view: View, place: Vector) -> list[Pose]:
    """The tool at `place`, as it is and turned about its closing axis, which lets the peg be."""
    turns = [view.tool.rotation() @ SO3.from_y_radians(turn) for turn in np.radians((0, 20, -20, 40, -40))]
    return [Pose.from_rotation_and_translation(turn, place) for turn in turns]


def _above(view: View, peg: ObjectState) -> float:
    """How far the tool is beyond the peg's end; infinite when it is nowhere near its line."""
    along, side, height = _in_peg(view, peg)
    return float(abs(along) - HALF_LENGTH) if max(abs(side), height) < 0.08 else np.inf


def _in_hand(view: View, peg: ObjectState) -> bool:
    """Whether the fingers have closed on it: the force between them is gone for instants while it swings."""
    along, side, height = _in_peg(view, peg)
    between = abs(along) < HALF_LENGTH + 0.008 and max(abs(side), height) < HALF_WIDTH
    return bool(between and view.opening < _opening(view.robot, -0.004))


def _axis(peg: ObjectState) -> Vector:
    return SO3(np.asarray(peg.quaternion)).as_matrix()[:, 0]


def _lean(peg: ObjectState) -> float:
    return lean_of(_axis(peg))


def _lowest(peg: ObjectState) -> float:
    """Height of its lowest corner."""
    half = np.array([HALF_LENGTH, HALF_WIDTH, HALF_WIDTH])
    return float(peg.position[2] - abs(SO3(np.asarray(peg.quaternion)).as_matrix()[2]) @ half)


def _onto(one: Vector, other: Vector) -> Vector:
    """Smallest rotation vector that takes unit vector `one` to `other`."""
    normal = np.cross(one, other)
    sine = float(np.linalg.norm(normal))
    return np.asarray(normal / max(sine, 1e-9) * np.arctan2(sine, one @ other))


def _opening(robot: RobotSpec, inside: float) -> float:
    """Gripper command that sends each finger this far inside the peg's side."""
    return float(np.clip((HALF_WIDTH - inside) / robot.gripper.stroke, 0.0, 1.0))


def _far(one: Pose, other: Pose) -> float:
    """Distance between poses, a radian counting as .2 m."""
    return float(np.linalg.norm(one.translation() - other.translation()) + 0.2 * angle_between(one, other))
