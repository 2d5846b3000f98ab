"""WordsPlaceSphere: put the named one of two balls into the named one of two bins and let go."""

from __future__ import annotations

import numpy as np

from blm.robots import RobotSpec
from blm.tasks.place_sphere import RADIUS, WALL, ball, in_bin, shallow_bin
from blm.tasks.spec import Item, Placement, Region, SceneDraw, TaskSpec, TaskState, pose
from blm.tasks.wordings import HELD_OUT_WORDINGS, TRAINING_WORDINGS
from blm.tasks.words import draw_colors, is_displaced, side_by_side

_GAP = (0.10, 0.14)
"""Range of the distance between the balls, and between the bins, in y [m]."""
_DEPTH = 0.015
"""Maximum offset of each ball and bin in x [m]."""
_APART = 0.06
"""Distance of balls and bins from the region's centre in x [m]."""


def _items(
    robot: RobotSpec, color: str = "blue", other: str = "red", bin_color: str = "yellow", rest: str = "green"
) -> tuple[Item, ...]:
    balls = ball("ball", color), ball("other_ball", other)
    return *balls, shallow_bin("bin", bin_color), shallow_bin("other_bin", rest)


def _sample(rng: np.random.Generator, robot: RobotSpec, region: Region) -> Placement:
    (near_x, near_y), (far_x, far_y) = region.draw(rng), region.draw(rng)
    ball_at, other_ball = side_by_side(rng, (near_x - _APART, near_y), _GAP, _DEPTH)
    bin_at, other_bin = side_by_side(rng, (far_x + _APART, far_y), _GAP, _DEPTH)
    return {
        "ball": pose(*ball_at, RADIUS),
        "other_ball": pose(*other_ball, RADIUS),
        "bin": pose(*bin_at, WALL),
        "other_bin": pose(*other_bin, WALL),
    }


def _scene(rng: np.random.Generator, robot: RobotSpec, region: Region) -> SceneDraw:
    color, other, bin_color, rest = draw_colors(rng, 4)
    return SceneDraw(
        _items(robot, color, other, bin_color, rest),
        _sample(rng, robot, region),
        {"color": color, "bin": bin_color},
        {"color": other, "bin": rest},
    )


def _wrong(state: TaskState) -> bool:
    return is_displaced(state, "other_ball") or in_bin(state, "other_bin")["success"]


WORDS_PLACE_SPHERE = TaskSpec(
    name="words_place_sphere",
    title="Place the named ball in the named bin",
    items=_items,
    sample=_sample,
    scene=_scene,
    success=in_bin,
    wrong=_wrong,
    phrasings=TRAINING_WORDINGS["words_place_sphere"][:4],
    held_out_phrasings=HELD_OUT_WORDINGS["words_place_sphere"],
    object="ball",
    goal="bin",
    swap={"ball": "other_ball", "other_ball": "ball", "bin": "other_bin", "other_bin": "bin"},
    chance=0.25,  # one of two balls, and one of two bins
    regions=dict.fromkeys(("panda", "xarm6", "xarm7"), Region((0.0, 0.0), (0.03, 0.05)))
    | {"widowxai": Region((-0.25, 0.0), (0.015, 0.02))},
)
