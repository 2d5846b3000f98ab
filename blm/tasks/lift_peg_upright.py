"""LiftPegUpright: make the lying peg stand on its end. After ManiSkill 3.0.1 LiftPegUpright-v1."""

from __future__ import annotations

import numpy as np

from blm.robots import RobotSpec
from blm.tasks.spec import Item, ObjectState, Part, Placement, Region, TaskSpec, TaskState, pose
from blm.types import FloatArray

HALF_LENGTH = 0.12
"""Half the length of the peg of the plain suite [m]; it weighs 0.6 kg."""
HALF_WIDTH = 0.025
"""Half the width of the same peg [m]."""
UPRIGHT = 0.08
"""Maximum angle from the vertical for success [rad]."""
LEVEL = 0.005
"""Maximum error of the centre's height for success [m]."""


def half_length(peg: ObjectState) -> float:
    """Return half the length of a peg, whose first part is one of its halves [m]."""
    return 2 * peg.size[0]


def angle_from_vertical(world_axis: np.ndarray) -> float:
    """Return the angle between the peg's axis [3], either end up, and the vertical [rad]."""
    return float(np.arccos(np.clip(abs(world_axis[2]), 0.0, 1.0)))


def peg(front: str, back: str) -> Item:
    """Return a peg along x whose halves have these colours."""
    size = (HALF_LENGTH / 2, HALF_WIDTH, HALF_WIDTH)
    ends = (
        Part("box", size, front, (HALF_LENGTH / 2, 0.0, 0.0)),
        Part("box", size, back, (-HALF_LENGTH / 2, 0.0, 0.0)),
    )
    return Item("peg", "peg", f"{front} and {back}", ends)


def _items(robot: RobotSpec) -> tuple[Item, ...]:
    return (peg("red", "blue"),)


def _sample(rng: np.random.Generator, robot: RobotSpec, region: Region) -> Placement:
    return {"peg": pose(*region.draw(rng), HALF_WIDTH)}


def axis_of(peg: ObjectState) -> FloatArray:
    """Return the direction of the peg's front end [3]."""
    w, x, y, z = peg.quaternion
    return np.array([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)])


def stands(state: TaskState) -> dict[str, bool]:
    """Return whether the peg stands on the table, on either end."""
    peg = state.objects["peg"]
    upright = angle_from_vertical(axis_of(peg)) < UPRIGHT
    level = bool(abs(peg.position[2] - half_length(peg)) < LEVEL)
    grasped = "peg" in state.grasped
    return {
        "is_upright": upright,
        "is_on_table": level,
        "is_grasped": grasped,
        "success": upright and level,
    }


LIFT_PEG_UPRIGHT = TaskSpec(
    name="lift_peg_upright",
    title="Stand a peg upright",
    items=_items,
    sample=_sample,
    success=stands,
    phrasings=(
        "Stand the peg upright on the table.",
        "Lift the red and blue peg and set it on its end.",
        "Raise the lying peg until it stands.",
        "Pick up the bar and put it upright.",
    ),
    held_out_phrasings=("Make the peg that lies on the table stand vertically.",),
    object="peg",
)
