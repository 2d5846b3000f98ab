"""What became of one episode: success, and of a failure the reason, from what each step showed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from blm.tasks import Env
from blm.types import FloatArray

Reason = Literal["never_grasped", "never_touched", "dropped", "missed_goal", "timeout"]
REASONS: tuple[Reason, ...] = get_args(Reason)
MOVED = 0.01
"""An object that was never further than this from where it started was not touched [m]."""
OPENED, OPENING_STEPS = 0.02, 4
"""Letting go on purpose: within so many steps of the grasp's end, the gripper is told to be more
than this wider (0..1) than it was while it held."""


@dataclass(frozen=True, eq=False)
class StepOutcome:
    """What the state after one step says about the task's object."""

    success: bool
    goal: bool
    """All of the task's conditions hold but those on rest and grasp: the object is where it should
    be."""
    held: bool
    resting: bool
    position: FloatArray
    """[3], m."""
    opening: float
    """The gripper's, measured."""
    command: float
    """The opening that it was told to have in this step."""


def observe_step(env: Env, command: float, info: Mapping[str, Any]) -> StepOutcome:
    """Read the moment after `env.step`, which returned `info` for an action with this gripper
    `command`.
    """
    flags = {name: bool(value) for name, value in info.items() if isinstance(value, bool | np.bool_)}
    place = [value for name, value in flags.items() if not _about_rest_or_grasp(name)]
    thing = env.objects()[env.task_spec.object]
    return StepOutcome(
        success=flags["success"],
        goal=all(place),
        held=flags.get("is_grasped", False),
        resting=thing.is_static,
        position=thing.position,
        opening=env.gripper_opening,
        command=command,
    )


def _about_rest_or_grasp(name: str) -> bool:
    return "success" in name or "static" in name or name == "is_grasped"


def judge(start: FloatArray, moments: Sequence[StepOutcome], *, prehensile: bool) -> dict[str, Any]:
    """The outcome fields of an episode's row; `start` [3] is where the object was before the first
    step.

    A failure, an episode without success at any step, has the first reason that fits:
    never_grasped  the object has to be grasped, and was held at no step
    never_touched  it has to be pushed or pulled, and was never more than 1 cm from its start
    timeout        at the last step it was held, or was where it should be while something else was missing
                   (the object or the arm still moved)
    dropped        the last grasp ended though the gripper was not told to open (see OPENED)
    timeout        at the last step the object still moved
    missed_goal    the rest: it was let go, or pushed, and lies somewhere else
    """
    first = first_success(moments)
    return {
        "success_once": first > 0,
        "success_at_end": moments[-1].success,
        "steps": len(moments),
        "first_success": first or None,
        "reason": "" if first else _reason(start, moments, prehensile),
    }


def first_success(moments: Sequence[StepOutcome]) -> int:
    """The first step after which the rule held, counted from 1; 0 for none."""
    return next((step for step, moment in enumerate(moments, start=1) if moment.success), 0)


def _reason(start: FloatArray, moments: Sequence[StepOutcome], prehensile: bool) -> Reason:
    last = moments[-1]
    if prehensile and not any(moment.held for moment in moments):
        return "never_grasped"
    if not prehensile and all(np.linalg.norm(moment.position - start) <= MOVED for moment in moments):
        return "never_touched"
    if last.goal or last.held:
        return "timeout"
    if prehensile and _lost(moments):
        return "dropped"
    return "missed_goal" if last.resting else "timeout"


def _lost(moments: Sequence[StepOutcome]) -> bool:
    """Whether the last grasp, which has ended, ended against the gripper's will."""
    end = max(step for step, moment in enumerate(moments) if moment.held) + 1
    widest = max(moment.command for moment in moments[end : end + OPENING_STEPS])
    return widest <= moments[end - 1].opening + OPENED
