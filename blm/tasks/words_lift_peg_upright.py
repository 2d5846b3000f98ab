"""WordsLiftPegUpright: make the lying peg stand with the named end up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from blm.robots import RobotSpec
from blm.tasks.lift_peg_upright import HALF_WIDTH, axis_of, peg, stands
from blm.tasks.spec import PALETTE, Item, Placement, Region, SceneDraw, TaskSpec, TaskState, pose
from blm.tasks.wordings import HELD_OUT_WORDINGS, TRAINING_WORDINGS
from blm.tasks.words import draw_colors


def _items(robot: RobotSpec, top: str = "red", bottom: str = "blue") -> tuple[Item, ...]:
    named = " and ".join(color for color in PALETTE if color in (top, bottom))  # does not tell the top
    return (replace(peg(top, bottom), color=named),)


def _sample(rng: np.random.Generator, robot: RobotSpec, region: Region) -> Placement:
    return {"peg": pose(*region.draw(rng), HALF_WIDTH, float(rng.choice((0.0, np.pi))))}


def _scene(rng: np.random.Generator, robot: RobotSpec, region: Region) -> SceneDraw:
    top, bottom = draw_colors(rng, 2)
    placement = _sample(rng, robot, region)
    return SceneDraw(_items(robot, top, bottom), placement, {"top": top}, {"top": bottom})


def _named_end_is_up(state: TaskState) -> bool:
    return bool(axis_of(state.objects["peg"])[2] > 0)


def _success(state: TaskState) -> dict[str, bool]:
    flags, up = stands(state), _named_end_is_up(state)
    return flags | {"is_named_end_up": up, "success": flags["success"] and up}


def _wrong(state: TaskState) -> bool:
    return stands(state)["success"] and not _named_end_is_up(state)


WORDS_LIFT_PEG_UPRIGHT = TaskSpec(
    name="words_lift_peg_upright",
    title="Stand a peg upright with the named end up",
    items=_items,
    sample=_sample,
    scene=_scene,
    success=_success,
    wrong=_wrong,
    phrasings=TRAINING_WORDINGS["words_lift_peg_upright"][:4],
    held_out_phrasings=HELD_OUT_WORDINGS["words_lift_peg_upright"],
    object="peg",
    swap={"peg": "peg"},
    chance=0.5,
    # Elsewhere the arm cannot grip each end and stand the peg on the other.
    regions={"widowxai": Region((-0.22, 0.0), (0.035, 0.05))},
)
