"""Success under the conditions of a protocol: by axis and level, against twins, and the headline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from blm.evaluation.conditions import Condition
from blm.evaluation.physical.success import SuccessSummary
from blm.evaluation.statistics import Difference, Rate


@dataclass(frozen=True, kw_only=True)
class ConditionSummary:
    """The episodes of one condition."""

    condition: Condition
    summary: SuccessSummary
    drop: Difference
    """Success under the condition minus that of the twins."""

    def to_json(self) -> dict[str, Any]:
        return {
            "condition": self.condition.to_json(),
            **self.summary.to_json(),
            "drop": asdict(self.drop),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(
            condition=Condition(**value["condition"]),
            summary=SuccessSummary.from_json(value),
            drop=Difference(**value["drop"]),
        )


@dataclass(frozen=True, kw_only=True)
class AxisSummary:
    """The episodes of one axis, all levels together."""

    axis: str
    success: Rate
    drop: Difference
    """Success on the axis minus that of the twins."""
    levels: tuple[ConditionSummary, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "axis": self.axis,
            "success": asdict(self.success),
            "drop": asdict(self.drop),
            "levels": [level.to_json() for level in self.levels],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(
            axis=value["axis"],
            success=Rate(**value["success"]),
            drop=Difference(**value["drop"]),
            levels=tuple(ConditionSummary.from_json(level) for level in value["levels"]),
        )


@dataclass(frozen=True, kw_only=True)
class PerturbedSummary:
    """All conditions of a protocol. `axes` are the headline; dynamics and controls are beside it."""

    mean_of_axes: Rate | None
    """Unweighted mean of the axes' success rates; None without axes."""
    drop: Difference | None
    """Success on all axes minus that of the twins; None without axes."""
    axes: tuple[AxisSummary, ...]
    dynamics: tuple[ConditionSummary, ...]
    controls: tuple[ConditionSummary, ...]
    chance: float | None
    """Success rate of a policy that solves its tasks and ignores words; None if it is not known."""
    wrong_object: Rate | None
    """Share of the plain episodes that failed by moving the wrong object; None if no task has one."""

    @property
    def worst_axis(self) -> AxisSummary | None:
        """The axis with the lowest success rate; None without axes."""
        return min(self.axes, key=lambda axis: axis.success.rate, default=None)

    def to_json(self) -> dict[str, Any]:
        worst = self.worst_axis
        return {
            "mean_of_axes": None if self.mean_of_axes is None else asdict(self.mean_of_axes),
            "drop": None if self.drop is None else asdict(self.drop),
            "worst_axis": None if worst is None else worst.axis,
            "axes": [axis.to_json() for axis in self.axes],
            "dynamics": [one.to_json() for one in self.dynamics],
            "controls": [one.to_json() for one in self.controls],
            "chance": self.chance,
            "wrong_object": None if self.wrong_object is None else asdict(self.wrong_object),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        mean, drop, wrong = (value[name] for name in ("mean_of_axes", "drop", "wrong_object"))
        return cls(
            mean_of_axes=None if mean is None else Rate(**mean),
            drop=None if drop is None else Difference(**drop),
            axes=tuple(AxisSummary.from_json(axis) for axis in value["axes"]),
            dynamics=tuple(ConditionSummary.from_json(one) for one in value["dynamics"]),
            controls=tuple(ConditionSummary.from_json(one) for one in value["controls"]),
            chance=value["chance"],
            wrong_object=None if wrong is None else Rate(**wrong),
        )
