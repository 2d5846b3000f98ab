"""PickCube, after ManiSkill 3.0.1 PickCube-v1: hold the red cube at the green goal.

The goal sphere is visible, unlike in ManiSkill, whose sensors do not show it; the policy only sees
images.
"""

from __future__ import annotations

import numpy as np

from blm.robots import RobotSpec
from blm.tasks.spec import STATIC_SPEED, Item, Part, Placement, Region, TaskSpec, TaskState, cube, pose


def goal_tolerance(robot: RobotSpec) -> float:
    """Return the radius of the goal, which is also the tolerance for success [m].

    It is 0.025, and 0.0225 for the WidowX AI.
    """
    return 1.25 * robot.workspace.cube_half


def goal_sphere(robot: RobotSpec) -> Item:
    """Return the visible goal."""
    ball = Part("sphere", (goal_tolerance(robot), 0.0, 0.0), "green")
    return Item("goal", "sphere", "green", (ball,), role="marker")


def _items(robot: RobotSpec) -> tuple[Item, ...]:
    return cube("cube", "red", robot.workspace.cube_half), goal_sphere(robot)


def _sample(rng: np.random.Generator, robot: RobotSpec, region: Region) -> Placement:
    half = robot.workspace.cube_half
    start = region.draw(rng)
    yaw = float(rng.uniform(0, 2 * np.pi))
    goal = region.draw(rng)
    height = half + float(rng.uniform(0, robot.workspace.height))
    return {"cube": pose(*start, half, yaw), "goal": pose(*goal, height)}


def held_at_goal(state: TaskState) -> dict[str, bool]:
    """Return whether the cube is at the goal and the arm at rest."""
    near = bool(np.linalg.norm(state.offset("cube", "goal")) <= goal_tolerance(state.robot))
    static, grasped = state.robot_speed <= STATIC_SPEED, "cube" in state.grasped
    return {"is_at_goal": near, "is_robot_static": static, "is_grasped": grasped, "success": near and static}


PICK_CUBE = TaskSpec(
    name="pick_cube",
    title="Pick up a cube and hold it at a goal",
    items=_items,
    sample=_sample,
    success=held_at_goal,
    phrasings=(
        "Pick up the red cube and move it to the green goal.",
        "Grasp the red cube and hold it at the green sphere.",
        "Lift the cube to the green ball.",
        "Take the red block and bring it to the green target in the air.",
    ),
    object="cube",
    goal="goal",
    held_out_phrasings=("Carry the red cube to where the green sphere floats.",),
)
