"""Task decompositions: the primitive that is due in a state, and the key poses of each task.

To add a task to the expert, write both functions of the measured state and add them to the two
tables.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from blm.planner.lift_peg import lift_peg_key_poses, lift_peg_upright
from blm.planner.primitives import (
    CARRY_NEAR,
    LIFT,
    UP,
    KeyPoses,
    Primitive,
    WorldState,
    carry,
    carry_key_poses,
    grasp,
    in_hand,
    place_on,
    push_key_poses,
    push_towards,
)
from blm.tasks.place_sphere import resting_height


def pick_cube(state: WorldState) -> Primitive:
    """Grasp the cube and hold it at the goal."""
    cube = state.item("cube")
    goal = state.item("goal").position
    if not in_hand(state, cube):
        return grasp(state, cube)
    if np.linalg.norm(cube.position - goal) < CARRY_NEAR:
        return Primitive(name="hold", opening=0.0)
    return carry(state, cube, goal)


def push_cube(state: WorldState, *, target: str = "target") -> Primitive:
    """Push the cube until it is well inside the target."""
    return push_towards(state, state.item("cube"), state.item(target).position, "push")


def pull_cube(state: WorldState, *, target: str = "target") -> Primitive:
    """Push the cube from its far side towards the arm, until it is well inside the target."""
    return push_towards(state, state.item("cube"), state.item(target).position, "pull")


def stack_cube(state: WorldState) -> Primitive:
    """Place the cube on the lower one and release it."""
    cube = state.item("cube")
    lower = state.item("lower")
    return place_on(state, cube, lower, rise=cube.size[2] + lower.size[2], within=0.02)


def place_sphere(state: WorldState) -> Primitive:
    """Place the ball in the bin and release it."""
    ball, tray = state.item("ball"), state.item("bin")
    return place_on(state, ball, tray, rise=resting_height(ball, tray), within=0.005)


DECOMPOSITIONS: dict[str, Callable[[WorldState], Primitive]] = {
    "push_cube": push_cube,
    "pull_cube": pull_cube,
    "pick_cube": pick_cube,
    "stack_cube": stack_cube,
    "place_sphere": place_sphere,
    "lift_peg_upright": lift_peg_upright,
    "words_push_cube": partial(push_cube, target="far_target"),
    "words_pull_cube": partial(pull_cube, target="near_target"),
    "words_pick_cube": pick_cube,
    "words_stack_cube": stack_cube,
    "words_place_sphere": place_sphere,
    "words_lift_peg_upright": partial(lift_peg_upright, named_end=True),
}
"""Task -> the primitive that is due in a measured state."""


def _push_key_poses(state: WorldState, *, target: str = "target") -> KeyPoses:
    return push_key_poses(state, state.item("cube"), state.item(target).position)


def _pick_key_poses(state: WorldState) -> KeyPoses:
    return carry_key_poses(state, state.item("cube"), state.item("goal").position)


def _stack_key_poses(state: WorldState) -> KeyPoses:
    lower = state.item("lower")
    return carry_key_poses(state, state.item("cube"), lower.position + (2 * lower.size[2] + LIFT) * UP)


def _place_key_poses(state: WorldState) -> KeyPoses:
    return carry_key_poses(state, state.item("ball"), state.item("bin").position + LIFT * UP)


KEY_POSES: dict[str, Callable[[WorldState], KeyPoses]] = {
    "push_cube": _push_key_poses,
    "pull_cube": _push_key_poses,
    "pick_cube": _pick_key_poses,
    "stack_cube": _stack_key_poses,
    "place_sphere": _place_key_poses,
    "lift_peg_upright": lift_peg_key_poses,
    "words_push_cube": partial(_push_key_poses, target="far_target"),
    "words_pull_cube": partial(_push_key_poses, target="near_target"),
    "words_pick_cube": _pick_key_poses,
    "words_stack_cube": _stack_key_poses,
    "words_place_sphere": _place_key_poses,
    "words_lift_peg_upright": partial(lift_peg_key_poses, named_end=True),
}
"""Task -> the key poses that decide whether the arm can reach a scene at all."""
