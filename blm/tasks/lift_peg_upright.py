"""LiftPegUpright: make the lying peg stand on its end. After ManiSkill 3.0.1 LiftPegUpright-v1."""

from __future__ import annotations

import numpy as np

from blm.robots import RobotSpec
from blm.tasks.spec import Item, Part, Placement, Region, TaskSpec, World, pose

HALF_LENGTH, HALF_WIDTH = 0.12, 0.025
"""Of the peg [m]; it weighs 0.6 kg."""
UPRIGHT, LEVEL = 0.08, 0.005
"""Greatest lean [rad] and greatest error of the centre's height [m]."""


def lean(world_axis: np.ndarray) -> float:
    """Angle between the peg's axis [3], either way up, and the vertical [rad]."""
    return float(np.arccos(np.clip(abs(world_axis[2]), 0.0, 1.0)))


def _items(robot: RobotSpec) -> tuple[Item, ...]:
    size = (HALF_LENGTH / 2, HALF_WIDTH, HALF_WIDTH)
    ends = (
        Part("box", size, "red", (HALF_LENGTH / 2, 0.0, 0.0)),
        Part("box", size, "blue", (-HALF_LENGTH / 2, 0.0, 0.0)),
    )
    return (Item("peg", "peg", "red and blue", ends),)


def _sample(rng: np.random.Generator, robot: RobotSpec, region: Region) -> Placement:
    return {"peg": pose(*region.draw(rng), HALF_WIDTH)}


def _success(world: World) -> dict[str, bool]:
    peg = world.objects["peg"]
    w, x, y, z = peg.quaternion
    axis = np.array([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)])  # its local x
    upright = lean(axis) < UPRIGHT
    level = bool(abs(peg.position[2] - HALF_LENGTH) < LEVEL)
    grasped = "peg" in world.grasped
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
    success=_success,
    phrasings=(
        "Stand the peg upright on the table.",
        "Lift the red and blue peg and set it on its end.",
        "Raise the lying peg until it stands.",
        "Pick up the bar and put it upright.",
    ),
    held_out_phrasings=("Make the peg that lies on the table stand vertically.",),
    object="peg",
)
