"""What the expert knows of each task: what to do now, and what the arm has to reach for it at all.

To teach the expert a task, write both functions of the measured state and add them here.
"""

from __future__ import annotations

from collections.abc import Callable

from blm.planner.lift_peg import lift_peg, lift_peg_key_poses
from blm.planner.primitives import (
    LIFT,
    UP,
    Stages,
    Step,
    View,
    carry_stages,
    pick,
    place,
    pull,
    push,
    push_stages,
    stack,
)

DECOMPOSITIONS: dict[str, Callable[[View], Step]] = {
    "push_cube": push,
    "pull_cube": pull,
    "pick_cube": pick,
    "stack_cube": stack,
    "place_sphere": place,
    "lift_peg_upright": lift_peg,
}
"""Task -> the primitive that is due in a measured state."""


def _stack_stages(view: View) -> Stages:
    lower = view.objects["lower"]
    return carry_stages(view, view.objects["cube"], lower.position + (2 * lower.size[2] + LIFT) * UP)


KEY_POSES: dict[str, Callable[[View], Stages]] = {
    "push_cube": push_stages,
    "pull_cube": push_stages,
    "pick_cube": lambda v: carry_stages(v, v.objects["cube"], v.objects["goal"].position),
    "stack_cube": _stack_stages,
    "place_sphere": lambda v: carry_stages(v, v.objects["ball"], v.objects["bin"].position + LIFT * UP),
    "lift_peg_upright": lift_peg_key_poses,
}
"""Task -> the stages that decide whether an arm can reach a scene at all."""
