"""WordsStackCube: put one cube on the other; the words tell which one comes on top."""

from __future__ import annotations

import numpy as np

from blm.robots import RobotSpec
from blm.tasks.spec import Item, Region, SceneDraw, TaskSpec, TaskState, cube
from blm.tasks.stack_cube import STACK_CUBE, stacked, two_cubes
from blm.tasks.wordings import HELD_OUT_WORDINGS, TRAINING_WORDINGS
from blm.tasks.words import DISPLACED, draw_colors


def _items(robot: RobotSpec, top: str = "red", bottom: str = "green") -> tuple[Item, ...]:
    half = robot.workspace.cube_half
    return cube("cube", top, half), cube("lower", bottom, half)


def _scene(rng: np.random.Generator, robot: RobotSpec, region: Region) -> SceneDraw:
    a, b = draw_colors(rng, 2)
    placement = two_cubes(rng, robot, region)
    return SceneDraw(_items(robot, a, b), placement, {"a": a, "b": b}, {"a": b, "b": a})


def _wrong(state: TaskState) -> bool:
    """Whether the lower cube was lifted; a push along the table can still end in the right stack."""
    return bool(state.displacement("lower")[2] > DISPLACED)


WORDS_STACK_CUBE = TaskSpec(
    name="words_stack_cube",
    title="Stack the named cube on the other",
    items=_items,
    sample=two_cubes,
    scene=_scene,
    success=stacked,
    wrong=_wrong,
    phrasings=TRAINING_WORDINGS["words_stack_cube"][:4],
    held_out_phrasings=HELD_OUT_WORDINGS["words_stack_cube"],
    object="cube",
    goal="lower",
    swap={"cube": "lower", "lower": "cube"},
    chance=0.5,
    regions=STACK_CUBE.regions,
)
