"""Result of a closed-loop evaluation: every episode, and success rates per cell and overall."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, Self

from blm.evaluation.conditions import PLAIN, Condition
from blm.evaluation.physical.perturbed import PerturbedSummary
from blm.evaluation.physical.success import SuccessSummary
from blm.evaluation.protocol import EpisodeKey, PhysicalProtocol
from blm.evaluation.results import EvaluationResult, Machine, ScoredItem
from blm.types import Training


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """One episode."""

    id: str
    """robot/task/seed, and the condition if it has one."""
    robot: str
    task: str
    seed: int
    scene: str
    """Hash of the initial poses of all objects and of the arm."""
    instruction: str
    phrasing: Literal["seen", "held_out"]
    """Whether the instruction is worded as in training."""
    video: str | None
    """File below the result's folder; None for an episode without a video."""
    seconds_policy: float
    """Time spent waiting for the policy [s]."""
    seconds_physics: float
    """Time spent stepping the simulation and judging [s]."""
    seconds_rendering: float
    """Time spent rendering the images that the policy sees [s]."""
    act_ms: float
    """Median duration of a decision [ms]."""
    success_once: bool
    """Whether the task's success rule held after some step."""
    success_at_end: bool
    """Whether it held after the last judged step."""
    steps: int
    """Number of judged steps."""
    first_success: int | None
    """First step after which the rule held, counted from 1; None for a failure."""
    reason: str
    """Reason of the failure, one of REASONS; empty for a success."""
    success_strict: bool | None = None
    """Whether the rule held after some judged step after which the object was also at rest, and on the
    table if it belongs there; None in results of older versions."""
    success_at_limit: bool | None = None
    """Whether the rule held at the step limit; None if the episode ended after its success."""
    condition: Condition = PLAIN
    """How the episode differs from its twin, the plain episode of the same scene."""

    @property
    def twin(self) -> str:
        """Identifier of the plain episode of the same robot, task and seed."""
        return EpisodeKey(self.robot, self.task, self.seed).id

    def to_json(self) -> dict[str, Any]:
        """Return the fields; a plain episode has no condition."""
        value = {**asdict(self), "condition": self.condition.to_json()}
        return {name: part for name, part in value.items() if name != "condition" or part}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**{**value, "condition": Condition(**value.get("condition", {}))})

    def without_times(self) -> Self:
        """Return the episode with all times set to zero; the rest is reproducible."""
        return replace(self, act_ms=0.0, seconds_policy=0.0, seconds_physics=0.0, seconds_rendering=0.0)


@dataclass(frozen=True)
class CellSummary:
    """The episodes of one cell: one robot and one task."""

    robot: str
    task: str
    summary: SuccessSummary
    phrasings: Mapping[str, SuccessSummary]

    @property
    def name(self) -> str:
        """Return "robot/task"."""
        return f"{self.robot}/{self.task}"

    def to_json(self) -> dict[str, Any]:
        phrasings = _phrasings_to_json(self.phrasings)
        return {"robot": self.robot, "task": self.task, **self.summary.to_json(), "phrasings": phrasings}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        phrasings = _phrasings_from_json(value["phrasings"])
        return cls(value["robot"], value["task"], SuccessSummary.from_json(value), phrasings)


def _phrasings_to_json(phrasings: Mapping[str, SuccessSummary]) -> dict[str, Any]:
    return {name: summary.to_json() for name, summary in phrasings.items()}


def _phrasings_from_json(value: Mapping[str, Any]) -> dict[str, SuccessSummary]:
    return {name: SuccessSummary.from_json(summary) for name, summary in value.items()}


@dataclass(frozen=True, kw_only=True)
class PhysicalSummary:
    """Success rates over all plain episodes, by phrasing of the instruction, and by cell; and over the
    perturbed ones."""

    overall: SuccessSummary
    phrasings: Mapping[str, SuccessSummary]
    cells: tuple[CellSummary, ...]
    """In the order of the protocol."""
    perturbed: PerturbedSummary | None = None
    """None for a protocol without conditions."""

    def to_json(self) -> dict[str, Any]:
        return {
            "overall": self.overall.to_json(),
            "phrasings": _phrasings_to_json(self.phrasings),
            "cells": [cell.to_json() for cell in self.cells],
            **({} if self.perturbed is None else {"perturbed": self.perturbed.to_json()}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(
            overall=SuccessSummary.from_json(value["overall"]),
            phrasings=_phrasings_from_json(value["phrasings"]),
            cells=tuple(CellSummary.from_json(cell) for cell in value["cells"]),
            perturbed=PerturbedSummary.from_json(value["perturbed"]) if "perturbed" in value else None,
        )


@dataclass(frozen=True)
class SharedPolicy:
    """Counts of a policy that all workers share. In batches, its rounding may vary between runs."""

    max_batch: int
    calls: int
    observations: int


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the episodes were run, and the time spent on each part, summed over workers."""

    workers: int
    shared_policy: SharedPolicy | None
    """None if each worker had its own policy."""
    seconds_policy: float
    seconds_physics: float
    seconds_rendering: float

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        shared = value["shared_policy"]
        return cls(
            workers=value["workers"],
            shared_policy=None if shared is None else SharedPolicy(**shared),
            **{name: value[name] for name in ("seconds_policy", "seconds_physics", "seconds_rendering")},
        )


@dataclass(frozen=True, kw_only=True)
class PhysicalResult(EvaluationResult):
    """A closed-loop evaluation of one policy under one protocol."""

    kind: ClassVar[str] = "physical"
    score: ClassVar[str] = "success_once"

    protocol: PhysicalProtocol
    summary: PhysicalSummary
    execution: Execution | None = None
    """None for a result that was combined from the episodes of several policies."""
    episodes: tuple[EpisodeResult, ...]
    """Empty for a published summary."""
    training: Training = "unknown"
    """Whether the policy was trained with randomized scenes, by its own record."""

    def items(self) -> list[ScoredItem]:
        """Return the episodes that count.

        They are the perturbed ones, without controls, if there are any: by condition, and clustered by
        scene, because each scene is run under several. Otherwise they are the plain ones, by cell.
        """
        perturbed = [one for one in self.episodes if one.condition.row and not one.condition.is_control]
        return [
            ScoredItem(
                id=episode.id,
                score=float(episode.success_once),
                stratum=episode.condition.label or f"{episode.robot} {episode.task}",
                phrasing=None if perturbed else episode.phrasing,
                scene=episode.scene,
                group=episode.twin if perturbed else None,
            )
            for episode in perturbed or self.episodes
            if perturbed or episode.condition == PLAIN
        ]

    def to_json(self) -> dict[str, Any]:
        value = super().to_json()
        if self.training != "unknown":
            value["training"] = self.training
        execution = {} if self.execution is None else asdict(self.execution)
        if execution:
            value["workers"] = execution.pop("workers")
        value |= self.summary.to_json() | execution
        if self.episodes:
            value["rows"] = [episode.to_json() for episode in self.episodes]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(
            protocol=PhysicalProtocol.from_json(value["protocol"]),
            machine=Machine.from_json(value["machine"]),
            seconds=value["seconds"],
            model=value["model"],
            training=value.get("training", "unknown"),
            summary=PhysicalSummary.from_json(value),
            execution=Execution.from_json(value) if "workers" in value else None,
            episodes=tuple(EpisodeResult.from_json(row) for row in value.get("rows", ())),
        )
