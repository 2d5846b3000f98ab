"""WordsPushCube: push the named one of two cubes onto the disc ahead of both.

There is an equal disc behind them, and `words_pull_cube` has the same scenes: the colour tells the cube,
and the verb tells the disc.
"""

from __future__ import annotations

import numpy as np

from blm.robots import RobotSpec
from blm.tasks.push_cube import disc
from blm.tasks.spec import Item, Placement, Region, SceneDraw, TaskSpec, TaskState, cube, pose
from blm.tasks.wordings import HELD_OUT_WORDINGS, TRAINING_WORDINGS
from blm.tasks.words import draw_colors, is_displaced, side_by_side

RADIUS = 0.08
"""Radius of the discs [m]."""
DISTANCE = 0.16
"""Distance of the discs' centres from the cubes' common centre [m]."""
_GAP = (0.10, 0.13)
"""Range of the distance between the cubes in y [m]."""
_DEPTH = 0.015
"""Maximum offset of each cube in x [m]."""
REGIONS = dict.fromkeys(("panda", "xarm6", "xarm7"), Region((0.0, 0.0), (0.05, 0.05))) | {
    "widowxai": Region((-0.19, 0.0), (0.03, 0.03))
}
"""Robot -> region of the cubes' common centre; near enough that both discs are within reach."""


def cubes_and_discs(robot: RobotSpec, color: str = "blue", other: str = "yellow") -> tuple[Item, ...]:
    """Return two cubes and two discs."""
    half = robot.workspace.cube_half
    discs = disc("far_target", RADIUS), disc("near_target", RADIUS)
    return cube("cube", color, half), cube("other", other, half), *discs


def sample_cubes_and_discs(rng: np.random.Generator, robot: RobotSpec, region: Region) -> Placement:
    """Draw two cubes side by side, a disc ahead and a disc behind."""
    half = robot.workspace.cube_half
    x, y = region.draw(rng)
    cube_at, other_at = side_by_side(rng, (x, y), _GAP, _DEPTH)
    return {
        "cube": pose(*cube_at, half),
        "other": pose(*other_at, half),
        "far_target": pose(x + DISTANCE, y, 0),
        "near_target": pose(x - DISTANCE, y, 0),
    }


def draw_cubes_and_discs(rng: np.random.Generator, robot: RobotSpec, region: Region) -> SceneDraw:
    """Draw the scene, with colours that are unlike the discs'."""
    color, other = draw_colors(rng, 2, unlike=("red", "white"))
    return SceneDraw(
        cubes_and_discs(robot, color, other),
        sample_cubes_and_discs(rng, robot, region),
        {"color": color},
        {"color": other},
    )


def is_on_disc(state: TaskState, name: str) -> bool:
    """Whether the cube's centre is inside a disc."""
    return bool(np.linalg.norm(state.offset("cube", name)[:2]) < RADIUS)


def _success(state: TaskState) -> dict[str, bool]:
    near = is_on_disc(state, "far_target")
    cube = state.objects["cube"]
    low = bool(cube.position[2] < cube.size[2] + 0.005)
    return {"is_at_target": near, "is_on_table": low, "success": near and low}


def _wrong(state: TaskState) -> bool:
    return is_displaced(state, "other") or is_on_disc(state, "near_target")


WORDS_PUSH_CUBE = TaskSpec(
    name="words_push_cube",
    title="Push the named cube",
    items=cubes_and_discs,
    sample=sample_cubes_and_discs,
    scene=draw_cubes_and_discs,
    success=_success,
    wrong=_wrong,
    phrasings=TRAINING_WORDINGS["words_push_cube"][:4],
    held_out_phrasings=HELD_OUT_WORDINGS["words_push_cube"],
    object="cube",
    goal="far_target",
    swap={"cube": "other", "other": "cube"},
    chance=0.25,  # one of two cubes, and one of two discs
    prehensile=False,
    regions=REGIONS,
)
