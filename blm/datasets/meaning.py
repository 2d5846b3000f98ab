"""What names and values tell about a dimension: its kind, its unit, and the stroke of a gripper."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from blm.action_space import RotationForm
from blm.datasets.mapping import Dimension
from blm.types import ActionKind, FloatArray

GRIPPER = re.compile(r"grip|jaw|claw|finger|eef_open|(^|[_.])hand(\.pos)?$")
NUMBERED = re.compile(r"((motor|dim|action|state)s?[_.]?)?\d+")
"""Names that only number the dimensions."""
QUATERNION = re.compile(r"(^|[_.])q(uat)?_?[wxyz]($|[_.])|quat")
ROTATION = re.compile(
    r"(^|[_.])(d?r[xyz]|d?w[xyz]|d?rot|d?roll|d?pitch|d?yaw|rot(ation)?_?\w*|axis_?angle\w*|rotvec\w*|theta)"
    r"($|[_.\d])"
)
POSITION = re.compile(
    r"(^|[_.])(d?[xyz]|(pos|position|trans|tcp|eef?|d|delta)_?[xyz])($|[_.])|eef?_?pos|translation"
)
RADIANS = 2 * np.pi + 0.3
"""Largest absolute value of a joint in radians."""
STROKES = (
    (0.0, 1.0),
    (-1.0, 1.0),
    (0.0, 100.0),
    (0.0, 255.0),
    (0.0, 0.04),
    (0.0, 0.08),
    (-0.04, 0.0),
    (0.0, 0.1),
)
"""Usual ranges of grippers: opening, command, percent, byte, finger or width in m."""
HALF_TURN = 2048.0
"""Middle of a servo's range [ticks]."""
MOST_DEGREES = 400.0
"""Largest absolute value of a joint in degrees; larger ones are ticks."""
MOST_STEP = 0.2
"""Largest step of an end effector in m."""
MOST_REACH = 5.0
"""Largest coordinate of an end effector in m."""


def kind_of_name(name: str, group: str, *, alone: bool) -> ActionKind:
    """Return the kind that a name, or the name of its group, tells; "unknown" if they do not.

    A group called hand with several dimensions (`alone` is False) is a hand with joints.
    """
    text = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower().replace(" ", "_").replace("/", ".")
    whole = f"{group.lower()}.{text}" if group else text
    delta = re.search(r"delta|(^|[_.])d_?[xyz]|(^|[_.])d(roll|pitch|yaw)|relative", whole) is not None
    if GRIPPER.search(whole if alone else text):
        return "gripper"
    if re.search(r"vel(ocity)?($|[_.])", whole):
        return (
            "base_velocity"
            if re.search(r"base|wheel|(^|[_.])(x|y|theta)[_.]vel", whole)
            else "joint_velocity"
        )
    if re.search(r"joint|motor|waist|shoulder|elbow|wrist|arm|leg|head|neck|lift|hand|qpos", whole) and not (
        re.search(r"eef|tcp|ee_", whole)
    ):
        return "delta_joint_position" if delta else "absolute_joint_position"
    if QUATERNION.search(whole) or ROTATION.search(whole):
        return "delta_eef_rotation" if delta else "absolute_eef_rotation"
    if POSITION.search(whole):
        return "delta_eef_position" if delta else "absolute_eef_position"
    return "unknown"


def suggested_gripper(one: Dimension, values: FloatArray, notes: list[str]) -> Dimension:
    """Return the dimension as a gripper whose stroke is a usual range around its values."""
    low, high = float(values.min()), float(values.max())
    slack = 0.02 * max(high - low, 1e-6)
    fitting = [
        (a, b) for a, b in STROKES if a - slack <= low and high <= b + slack and high - low > 0.3 * (b - a)
    ]
    usual = min(fitting, key=lambda stroke: stroke[1] - stroke[0], default=None)
    if usual is None:
        usual = (round(low, 4), round(high, 4)) if high > low else (0.0, 1.0)
    zero, opened = usual if usual != (-0.04, 0.0) else (0.0, -0.04)
    notes.append(
        f"gripper '{one.name}' of {one.feature}: {zero:g} is taken for closed and {opened:g} for open; its "
        f"values go from {low:.3g} to {high:.3g}. Exchange 'zero' and 'one' if it is the other way round"
    )
    return replace(one, kind="gripper", unit="opening", zero=zero, one=opened)


def is_gripper(values: FloatArray) -> bool:
    """Return whether values look like an opening, a command in -1..1 or a width in m."""
    return -1.1 <= float(values.min()) < float(values.max()) <= 1.1


def with_units(
    part: Sequence[Dimension], largest: Mapping[str, float], notes: list[str]
) -> tuple[Dimension, ...]:
    """Return dimensions with units that suit their kinds.

    `largest` is the largest absolute value of each kind in the dataset, because all dimensions of a
    kind have one unit; it is negative if the values are whole numbers.
    """
    return tuple(_with_unit(one, largest, rotation_form(part), notes) for one in part)


def _with_unit(
    one: Dimension, largest: Mapping[str, float], form: RotationForm, notes: list[str]
) -> Dimension:
    signed = largest.get(one.kind, 0.0)
    most = abs(signed)
    if one.kind in ("gripper", "unknown"):
        return one
    if one.kind == "other" or one.kind.endswith("velocity"):
        return replace(one, unit="none")
    if one.kind.endswith("eef_rotation"):
        is_input = one.kind.startswith("delta") and abs(largest.get("delta_eef_position", 0.0)) > MOST_STEP
        if is_input or form not in ("euler_xyz", "rotation_vector"):
            return replace(one, unit="none")
        return replace(one, unit="rad" if most <= RADIANS else "deg")
    if one.kind.endswith("eef_position"):
        if one.kind.startswith("delta") and most > MOST_STEP:
            notes.append(f"steps of up to {most:.3g} are a controller's input, not metres (unit 'none')")
            return replace(one, unit="none")
        return replace(one, unit="m" if most < MOST_REACH else "mm")
    if one.kind == "delta_joint_position":
        return replace(one, unit=_unit_of_joints(largest.get("absolute_joint_position", signed)))
    unit = _unit_of_joints(signed)
    if unit == "deg":
        notes.append(
            f"joints reach {most:.4g}: degrees are taken; write 'percent' for LeRobot's -100..100 of a range"
        )
    elif unit == "ticks":
        notes.append(f"joints reach {most:.4g}: servo ticks, 4096 a turn around {HALF_TURN:g}, are taken")
    elif unit == "none":
        notes.append(f"joints reach {most:.4g}, which is neither rad nor degrees nor ticks (unit 'none')")
    return replace(one, unit=unit, zero=HALF_TURN if unit == "ticks" else 0.0)


def _unit_of_joints(signed: float) -> str:
    most = abs(signed)
    if most <= RADIANS:
        return "rad"
    return "deg" if most <= MOST_DEGREES else "ticks" if signed < 0 else "none"


def rotation_form(part: Sequence[Dimension]) -> RotationForm:
    """Return the form of the rotations among these dimensions, by names and number."""
    names = [one.name.lower() for one in part if one.kind.endswith("eef_rotation")]
    if not names:
        return "none"
    if any(QUATERNION.search(name) for name in names):
        return "quaternion_wxyz" if re.search(r"w($|[_.])", names[0]) else "quaternion_xyzw"
    numbered = any(re.search(r"rot(ation)?[_.]?\d", name) for name in names)
    if any("6d" in name for name in names) or (numbered and len(names) % 6 == 0):
        return "matrix_6d"
    if any(re.search(r"axis_?angle|rotvec|(^|[_.])r[xyz]($|[_.])", name) for name in names):
        return "rotation_vector"
    return "euler_xyz"
