"""StackCube: put the red cube on the green one and let go. After ManiSkill 3.0.1 StackCube-v1."""

from __future__ import annotations

import numpy as np

from blm.robots import RobotSpec
from blm.tasks.spec import Item, Placement, Region, TaskSpec, TaskState, cube, pose

_SPREAD = (1.0, 2.0)
"""Range of the cubes around their common centre, as a multiple of the half extents."""


def _items(robot: RobotSpec) -> tuple[Item, ...]:
    half = robot.workspace.cube_half
    return cube("cube", "red", half), cube("lower", "green", half)


def two_cubes(rng: np.random.Generator, robot: RobotSpec, region: Region) -> Placement:
    """Draw the poses of two cubes that do not overlap."""
    half = robot.workspace.cube_half
    apart = 2 * (np.sqrt(2) * half + 0.001)  # bounding circles do not overlap at any yaw
    centre, spread = np.array(region.draw(rng)), np.array(region.half) * _SPREAD
    while True:
        (x, y), (u, v) = centre + spread * rng.uniform(-1, 1, size=(2, 2))
        if np.hypot(x - u, y - v) > apart:
            break
    yaws = rng.uniform(0, 2 * np.pi, size=2)
    return {"cube": pose(x, y, half, yaws[0]), "lower": pose(u, v, half, yaws[1])}


def stacked(state: TaskState) -> dict[str, bool]:
    """Return whether the cube stands on the lower one, at rest and released."""
    cube, lower = state.objects["cube"], state.objects["lower"]
    offset = state.offset("cube", "lower")
    level = abs(offset[2] - (cube.size[2] + lower.size[2])) <= 0.005
    on = bool(np.linalg.norm(offset[:2]) <= np.sqrt(2) * lower.size[0] + 0.005 and level)
    return state.placed("cube", "is_on_lower", on)


STACK_CUBE = TaskSpec(
    name="stack_cube",
    title="Stack a cube on another",
    items=_items,
    sample=two_cubes,
    success=stacked,
    phrasings=(
        "Stack the red cube on the green cube.",
        "Put the red cube on top of the green one and let go.",
        "Pick up the red block and set it on the green block.",
        "Place the red cube onto the green cube.",
    ),
    held_out_phrasings=("Build a tower: red cube above, green cube below.",),
    object="cube",
    goal="lower",
    # Half of ManiSkill's range: none of our cameras shows cubes 0.3 m to the side.
    regions=dict.fromkeys(("panda", "xarm6", "xarm7"), Region((0.0, 0.0), (0.05, 0.05)))
    | {"widowxai": Region((-0.25, 0.0), (0.025, 0.025))},
)
