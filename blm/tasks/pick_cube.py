"""PickCube: lift the red cube to the green goal and hold it there. After ManiSkill 3.0.1 PickCube-v1.

The goal sphere is visible (ManiSkill hides it from its sensors), else images would not say where it is.
"""

from __future__ import annotations

import numpy as np

from blm.robots import RobotSpec
from blm.tasks.spec import STATIC_SPEED, Item, Part, Placement, Region, TaskSpec, World, cube, pose


def goal_tolerance(robot: RobotSpec) -> float:
    """Radius of the goal and greatest distance from it [m]: .025; .0225 with the WidowX AI's smaller cube."""
    return 1.25 * robot.workspace.cube_half


def _items(robot: RobotSpec) -> tuple[Item, ...]:
    ball = Part("sphere", (goal_tolerance(robot), 0.0, 0.0), "green")
    red = cube("cube", "red", robot.workspace.cube_half)
    return red, Item("goal", "sphere", "green", (ball,), role="marker")


def _sample(rng: np.random.Generator, robot: RobotSpec, region: Region) -> Placement:
    half = robot.workspace.cube_half
    start, yaw, goal = region.draw(rng), float(rng.uniform(0, 2 * np.pi)), region.draw(rng)
    height = half + float(rng.uniform(0, robot.workspace.height))
    return {"cube": pose(*start, half, yaw), "goal": pose(*goal, height)}


def _success(world: World) -> dict[str, bool]:
    near = bool(np.linalg.norm(world.offset("cube", "goal")) <= goal_tolerance(world.robot))
    static, grasped = world.robot_speed <= STATIC_SPEED, "cube" in world.grasped
    return {"is_at_goal": near, "is_robot_static": static, "is_grasped": grasped, "success": near and static}


PICK_CUBE = TaskSpec(
    name="pick_cube",
    title="Pick up a cube and hold it at a goal",
    items=_items,
    sample=_sample,
    success=_success,
    phrasings=(
        "Pick up the red cube and move it to the green goal.",
        "Grasp the red cube and hold it at the green sphere.",
        "Lift the cube to the green ball.",
        "Take the red block and bring it to the green target in the air.",
    ),
    object="cube",
    held_out_phrasings=("Carry the red cube to where the green sphere floats.",),
)
