"""PushCube: push the blue cube onto the round target ahead of it.

After ManiSkill 3.0.1 PushCube-v1.
"""

from __future__ import annotations

import numpy as np

from blm.robots import RobotSpec
from blm.tasks.spec import Item, Part, Placement, Region, TaskSpec, TaskState, cube, pose

TARGET_RADIUS = 0.1
"""Radius of the target [m]."""
TARGET_DISTANCE = 0.2
"""Distance of the target's centre from the cube at the start [m]."""
_RINGS = ("red", "white", "red", "white", "red")


def disc(name: str, radius: float) -> Item:
    """Return a flat round target."""
    rings = tuple(
        Part("cylinder", (radius * (1 - index / len(_RINGS)), 0.0004 * (index + 1), 0.0), color)
        for index, color in enumerate(_RINGS)
    )
    return Item(name, "disc", "red and white", rings, role="marker")


def cube_and_target(robot: RobotSpec) -> tuple[Item, ...]:
    """Return a blue cube and a flat round target."""
    return cube("cube", "blue", robot.workspace.cube_half), disc("target", TARGET_RADIUS)


def _sample(rng: np.random.Generator, robot: RobotSpec, region: Region) -> Placement:
    x, y = region.draw(rng)
    return {"cube": pose(x, y, robot.workspace.cube_half), "target": pose(x + TARGET_DISTANCE, y, 0)}


def _success(state: TaskState) -> dict[str, bool]:
    near = bool(np.linalg.norm(state.offset("cube", "target")[:2]) < TARGET_RADIUS)
    cube = state.objects["cube"]
    low = bool(cube.position[2] < cube.size[2] + 0.005)
    return {"is_at_target": near, "is_on_table": low, "success": near and low}


PUSH_CUBE = TaskSpec(
    name="push_cube",
    title="Push a cube to a target",
    items=cube_and_target,
    sample=_sample,
    success=_success,
    phrasings=(
        "Push the blue cube onto the red and white target.",
        "Move the cube forward into the target circle.",
        "Slide the blue block to the round target.",
        "Shove the cube ahead until it is on the target.",
    ),
    held_out_phrasings=("Get the blue cube to the bullseye by pushing it.",),
    object="cube",
    goal="target",
    prehensile=False,
    view_shift=0.1,
)
