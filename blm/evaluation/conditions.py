"""Conditions of an episode: a level of a perturbed axis, changed dynamics, or a control of language.

`blm.tasks.suite_plus` defines the perturbations and `blm.tasks.wordings` the test wordings. An
episode without a condition is the *twin* of all perturbed episodes of its robot, task and seed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from blm.tasks import TASKS
from blm.tasks.suite_plus import AXES, DYNAMICS, LEVELS, dynamics, perturbation
from blm.tasks.wordings import TEST_WORDINGS
from blm.types import BlmError, lookup

CONTROLS = ("blank", "other")
"""Controls of language: no instruction at all, and the instruction of another task or thing."""
_NAMED = {"dynamics": tuple(DYNAMICS), "control": CONTROLS}
OTHER_TASK = {
    "push_cube": "pull_cube",
    "pull_cube": "push_cube",
    "pick_cube": "lift_peg_upright",
    "stack_cube": "place_sphere",
    "place_sphere": "stack_cube",
    "lift_peg_upright": "pick_cube",
}
"""Task -> the task whose instruction the control "other" gives. In the scenes of any other task
there is another thing to name, and success is judged by that thing."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """How an episode differs from the plain suite; by default not at all."""

    axis: str = ""
    """One of AXES, "dynamics", or "control"; empty for a plain episode."""
    level: int = 0
    """Level on one of AXES, one of LEVELS; 0 elsewhere."""
    name: str = ""
    """Name of changed dynamics, or of a control; empty elsewhere."""

    def __post_init__(self) -> None:
        """Raises BlmError, which lists the valid choices, for an unknown axis, level or name."""
        lookup("axis", self.axis, dict.fromkeys(("", *AXES, *_NAMED)))
        if self.axis in AXES:
            lookup(f"level of axis '{self.axis}'", str(self.level), {str(level): 0 for level in LEVELS})
        elif self.axis in _NAMED:
            lookup(f"{self.axis} condition", self.name, dict.fromkeys(_NAMED[self.axis]))
        if (self.level and self.axis not in AXES) or (self.name and self.axis not in _NAMED):
            raise BlmError(f"{self}: only {', '.join(AXES)} have levels, and only {', '.join(_NAMED)} names")

    @property
    def is_graded(self) -> bool:
        """Whether it is a level of one of AXES."""
        return self.axis in AXES

    @property
    def is_control(self) -> bool:
        """Whether it is a control of language, which counts in no score."""
        return self.axis == "control"

    @property
    def needs_variation(self) -> bool:
        """Whether the simulator must be changed: for all but language."""
        return self.axis not in ("", "language", "control")

    @property
    def row(self) -> str:
        """Name of its row in a table: the axis, or the name of dynamics or control."""
        return self.name or self.axis

    @property
    def label(self) -> str:
        """Axis and level, or the name; empty for a plain episode."""
        return f"{self.axis}-{self.level}" if self.level else self.name

    def to_json(self) -> dict[str, Any]:
        """Return the fields that it has."""
        value = {"axis": self.axis, "level": self.level, "name": self.name}
        return {name: part for name, part in value.items() if part}

    def reset_options(self, robot: str, task: str, seed: int) -> dict[str, Any]:
        """Return the options of `TaskEnv.reset` that give an episode this condition.

        Raises BlmError for a task without test wordings.
        """
        if self.axis == "language":
            wordings = lookup("task with test wordings", task, TEST_WORDINGS)[self.level]
            return {"wording": wordings[seed % len(wordings)]}
        if self.is_graded:
            return {"variation": perturbation(self.axis, self.level, robot, task, seed)}
        if self.axis == "dynamics":
            return {"variation": dynamics(self.name, robot, task, seed)}
        if self.name == "blank":
            return {"wording": ""}
        if self.name == "other":
            other = OTHER_TASK.get(task)
            return {"wording": TASKS[other].instruction(0)} if other else {"named": "other"}
        return {}


def chance(tasks: Iterable[str]) -> float | None:
    """Return the mean success rate of policies that solve these tasks but ignore words.

    It is None if words do not decide in the scenes of one of these tasks (`TaskSpec.chance` is 1).
    """
    rates = [lookup("task", task, TASKS).chance for task in tasks]
    return None if not rates or max(rates) == 1 else sum(rates) / len(rates)


PLAIN = Condition()
"""An episode of the plain suite."""


def graded(axes: Iterable[str] = AXES, levels: Sequence[int] = LEVELS) -> tuple[Condition, ...]:
    """Return the conditions of these axes and levels."""
    return tuple(Condition(axis=axis, level=level) for axis in axes for level in levels)


def named(axis: str) -> tuple[Condition, ...]:
    """Return all conditions of the axis "dynamics" or "control"."""
    return tuple(Condition(axis=axis, name=name) for name in _NAMED[axis])


def select(
    conditions: Sequence[Condition], rows: Collection[str] = (), levels: Collection[int] = ()
) -> tuple[Condition, ...]:
    """Return the conditions of these rows (see `Condition.row`) and levels; by default of all.

    Levels select among graded axes only. Raises BlmError, which lists the valid choices, for a row or a
    level that no condition has.
    """
    have = dict.fromkeys(condition.row for condition in conditions)
    graded_levels = {str(condition.level): 0 for condition in conditions if condition.is_graded}
    for chosen, there, what in ((rows, have, "axis"), (levels, graded_levels, "level")):
        if chosen and not there:
            raise BlmError(f"{what} {', '.join(map(str, chosen))}: this protocol has none to choose from")
        for one in chosen:
            lookup(f"{what} of this protocol", str(one), there)
    return tuple(
        condition
        for condition in conditions
        if (not rows or condition.row in rows)
        and (not levels or not condition.is_graded or condition.level in levels)
    )
