"""PullCube: pull the blue cube onto the round target before it.

After ManiSkill 3.0.1 PullCube-v1.
"""

from __future__ import annotations

import numpy as np

from blm.robots import RobotSpec
from blm.tasks.push_cube import TARGET_DISTANCE, TARGET_RADIUS, cube_and_target
from blm.tasks.spec import Placement, Region, TaskSpec, TaskState, pose


def _sample(rng: np.random.Generator, robot: RobotSpec, region: Region) -> Placement:
    x, y = region.draw(rng)
    return {"cube": pose(x, y, robot.workspace.cube_half), "target": pose(x - TARGET_DISTANCE, y, 0)}


def _success(state: TaskState) -> dict[str, bool]:
    near = bool(np.linalg.norm(state.offset("cube", "target")[:2]) < TARGET_RADIUS)
    return {"is_at_target": near, "success": near}


PULL_CUBE = TaskSpec(
    name="pull_cube",
    title="Pull a cube to a target",
    items=cube_and_target,
    sample=_sample,
    success=_success,
    phrasings=(
        "Pull the blue cube onto the red and white target.",
        "Drag the cube back to the target circle.",
        "Draw the blue block towards the robot until it is on the round target.",
        "Move the cube backward onto the target.",
    ),
    held_out_phrasings=("Get the blue cube to the bullseye by pulling it.",),
    object="cube",
    goal="target",
    regions={
        "widowxai": Region((-0.13, 0.0), (0.05, 0.05))
    },  # otherwise the target would be at the robot's base
    prehensile=False,
    view_shift=-0.1,
)
