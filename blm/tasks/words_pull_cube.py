"""WordsPullCube: pull the named one of two cubes onto the disc behind both.

The scenes are those of `words_push_cube`.
"""

from __future__ import annotations

from blm.tasks.spec import TaskSpec, TaskState
from blm.tasks.wordings import HELD_OUT_WORDINGS, TRAINING_WORDINGS
from blm.tasks.words import is_displaced
from blm.tasks.words_push_cube import (
    REGIONS,
    cubes_and_discs,
    draw_cubes_and_discs,
    is_on_disc,
    sample_cubes_and_discs,
)


def _success(state: TaskState) -> dict[str, bool]:
    near = is_on_disc(state, "near_target")
    return {"is_at_target": near, "success": near}


def _wrong(state: TaskState) -> bool:
    return is_displaced(state, "other") or is_on_disc(state, "far_target")


WORDS_PULL_CUBE = TaskSpec(
    name="words_pull_cube",
    title="Pull the named cube",
    items=cubes_and_discs,
    sample=sample_cubes_and_discs,
    scene=draw_cubes_and_discs,
    success=_success,
    wrong=_wrong,
    phrasings=TRAINING_WORDINGS["words_pull_cube"][:4],
    held_out_phrasings=HELD_OUT_WORDINGS["words_pull_cube"],
    object="cube",
    goal="near_target",
    swap={"cube": "other", "other": "cube"},
    chance=0.25,  # one of two cubes, and one of two discs
    prehensile=False,
    regions=REGIONS,
)
