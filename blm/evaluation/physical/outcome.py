"""Outcome of one episode: success, or the reason of the failure, from the state after each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from blm.tasks import TaskEnv
from blm.types import FloatArray

Reason = Literal["wrong_object", "never_grasped", "never_touched", "dropped", "missed_goal", "timeout"]
REASONS: tuple[Reason, ...] = get_args(Reason)
MOVED = 0.01
"""An object that never moved further than this from its start was not touched [m]."""
OPENED = 0.02
OPENING_STEPS = 4
"""A release is deliberate if, within OPENING_STEPS after the end of the grasp, the commanded
opening exceeds the opening during the grasp by more than OPENED (0..1)."""


@dataclass(frozen=True, eq=False)
class StepOutcome:
    """The state of the task's object after one control step."""

    success: bool
    goal: bool
    """The object is at its goal: all conditions of the task hold but those on rest and grasp."""
    held: bool
    resting: bool
    position: FloatArray
    """Position of the object [3], m."""
    opening: float
    """Measured opening of the gripper (0..1)."""
    command: float
    """Commanded opening of the gripper in this step (0..1)."""
    settled: bool = False
    """The object is at rest, and on the table if it belongs there (`TaskSpec.is_settled`)."""
    wrong: bool = False
    """The task was done with another thing than the named one, or that was moved, up to this step."""


@dataclass(frozen=True)
class EpisodeOutcome:
    """Success of an episode, or the reason of its failure."""

    success_once: bool
    success_at_end: bool
    success_strict: bool
    """Whether the rule held after some judged step after which the object had also settled."""
    steps: int
    first_success: int | None
    """First step after which the task's rule held, counted from 1; None for a failure."""
    reason: Reason | Literal[""]
    """Empty for an episode that succeeded at some step."""


def observe_step(env: TaskEnv, command: float, info: Mapping[str, Any]) -> StepOutcome:
    """Observe the state after `env.step`.

    `info` is what it returned, `command` the gripper opening in the action.
    """
    flags = {name: bool(value) for name, value in info.items() if isinstance(value, bool | np.bool_)}
    wrong = flags.pop("is_wrong_object", False)
    place = [value for name, value in flags.items() if not _is_about_rest_or_grasp(name)]
    thing = env.named_objects()[env.task_spec.object]
    return StepOutcome(
        success=flags["success"],
        goal=all(place),
        held=flags.get("is_grasped", False),
        resting=thing.is_static,
        position=thing.position,
        opening=env.gripper_opening,
        command=command,
        settled=env.task_spec.is_settled(thing),
        wrong=wrong,
    )


def _is_about_rest_or_grasp(name: str) -> bool:
    return "success" in name or "static" in name or name == "is_grasped"


def judge(start: FloatArray, steps: Sequence[StepOutcome], *, prehensile: bool) -> EpisodeOutcome:
    """Judge an episode; `start` [3] is the position of the object before the first step.

    A failure is an episode without success at any step. Its reason is the first that fits:
    wrong_object   the task was done with another thing than the instruction names, or that thing was
                   moved (`TaskSpec.wrong`)
    never_grasped  the object has to be grasped, and was held at no step
    never_touched  it has to be pushed or pulled, and was never more than 1 cm from its start
    timeout        at the last step it was held, or was at its goal while another condition was
                   missing (the object or the arm still moved)
    dropped        the last grasp ended without a command to open (see OPENED)
    timeout        at the last step the object still moved
    missed_goal    otherwise: it was released, or pushed, and lies somewhere else
    """
    first = first_success(steps)
    return EpisodeOutcome(
        success_once=first > 0,
        success_at_end=steps[-1].success,
        success_strict=any(step.success and step.settled for step in steps),
        steps=len(steps),
        first_success=first or None,
        reason="" if first else _reason(start, steps, prehensile),
    )


def first_success(steps: Sequence[StepOutcome]) -> int:
    """Return the first step after which the rule held, counted from 1; 0 for none."""
    return next((number for number, step in enumerate(steps, start=1) if step.success), 0)


def _reason(start: FloatArray, steps: Sequence[StepOutcome], prehensile: bool) -> Reason:
    last = steps[-1]
    if last.wrong:
        return "wrong_object"
    if prehensile and not any(step.held for step in steps):
        return "never_grasped"
    if not prehensile and all(np.linalg.norm(step.position - start) <= MOVED for step in steps):
        return "never_touched"
    if last.goal or last.held:
        return "timeout"
    if prehensile and _is_dropped(steps):
        return "dropped"
    return "missed_goal" if last.resting else "timeout"


def _is_dropped(steps: Sequence[StepOutcome]) -> bool:
    """Return whether the last grasp, which has ended, ended without a command to open."""
    end = max(index for index, step in enumerate(steps) if step.held) + 1
    widest = max(step.command for step in steps[end : end + OPENING_STEPS])
    return widest <= steps[end - 1].opening + OPENED
