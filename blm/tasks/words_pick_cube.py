"""WordsPickCube: pick up the named one of two cubes and hold it at the goal."""

from __future__ import annotations

import numpy as np

from blm.robots import RobotSpec
from blm.tasks.pick_cube import goal_sphere, held_at_goal
from blm.tasks.spec import Item, Placement, Region, SceneDraw, TaskSpec, TaskState, cube, pose
from blm.tasks.wordings import HELD_OUT_WORDINGS, TRAINING_WORDINGS
from blm.tasks.words import draw_colors, is_displaced, side_by_side

_GAP = (0.09, 0.14)
"""Range of the distance between the cubes in y [m]."""
_DEPTH = 0.02
"""Maximum offset of each cube in x [m]."""


_LOW = 0.13
"""Height below which no hand at home hides a goal from the cameras base and wrist [m]."""
_AHEAD = 0.4
"""Minimum x of a higher goal in the region, as a multiple of the half extent: there it is visible too."""


def _items(robot: RobotSpec, color: str = "red", other: str = "blue") -> tuple[Item, ...]:
    half = robot.workspace.cube_half
    return cube("cube", color, half), cube("other", other, half), goal_sphere(robot)


def _sample(rng: np.random.Generator, robot: RobotSpec, region: Region) -> Placement:
    half = robot.workspace.cube_half
    cube_at, other_at = side_by_side(rng, region.draw(rng), _GAP, _DEPTH)
    yaws = rng.uniform(0, 2 * np.pi, size=2)
    while True:
        goal = region.draw(rng)
        height = 4 * half + float(rng.uniform(0, robot.workspace.height - 3 * half))  # above both cubes
        if height < _LOW or goal[0] - region.centre[0] > _AHEAD * region.half[0]:
            break
    return {
        "cube": pose(*cube_at, half, yaws[0]),
        "other": pose(*other_at, half, yaws[1]),
        "goal": pose(*goal, height),
    }


def _scene(rng: np.random.Generator, robot: RobotSpec, region: Region) -> SceneDraw:
    color, other = draw_colors(rng, 2, unlike=("green",))
    placement = _sample(rng, robot, region)
    return SceneDraw(_items(robot, color, other), placement, {"color": color}, {"color": other})


def _wrong(state: TaskState) -> bool:
    return is_displaced(state, "other")


WORDS_PICK_CUBE = TaskSpec(
    name="words_pick_cube",
    title="Pick up the named cube",
    items=_items,
    sample=_sample,
    scene=_scene,
    success=held_at_goal,
    wrong=_wrong,
    phrasings=TRAINING_WORDINGS["words_pick_cube"][:4],
    held_out_phrasings=HELD_OUT_WORDINGS["words_pick_cube"],
    object="cube",
    goal="goal",
    swap={"cube": "other", "other": "cube"},
    chance=0.5,
    regions=dict.fromkeys(("panda", "xarm6", "xarm7"), Region((0.0, 0.0), (0.08, 0.08))),
)
