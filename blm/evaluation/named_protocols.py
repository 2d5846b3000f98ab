"""Named protocols as data: the fields of a `PhysicalProtocol` that do not follow from the policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Required, TypedDict

from blm.evaluation.conditions import Condition, graded, named
from blm.tasks.registry import SUITE24, WORDS

Phrasing = Literal["seen", "held_out", "both"]
Latency = Literal["none", "measured"] | float


class ProtocolOverrides(TypedDict, total=False):
    """The fields of a `PhysicalProtocol` that do not follow from the policy."""

    robots: Sequence[str]
    tasks: Sequence[str]
    episodes: int
    first_seed: int
    max_steps: int
    settle_steps: int
    phrasing: Phrasing
    latency: Latency
    simulator: str
    conditions: Sequence[Condition]
    visible_goals: bool


class ProtocolSettings(ProtocolOverrides, total=False):
    """The fields of `ProtocolOverrides`, with robots, tasks and episodes required."""

    robots: Required[Sequence[str]]  # type: ignore[misc]
    tasks: Required[Sequence[str]]  # type: ignore[misc]
    episodes: Required[int]  # type: ignore[misc]


_SUITE24: ProtocolSettings = {
    "robots": ("panda", "xarm6", "xarm7", "widowxai"),
    "tasks": SUITE24,
    "episodes": 50,
    "first_seed": 0,
    "max_steps": 200,
    "phrasing": "both",
}
PROTOCOLS: dict[str, ProtocolSettings] = {
    "suite24": _SUITE24,
    "suite24-v2": {**_SUITE24, "visible_goals": True},
    "suite24-plus": {**_SUITE24, "episodes": 5, "conditions": (*graded(), *named("control"))},
    "suite24-dynamics": {**_SUITE24, "episodes": 5, "conditions": named("dynamics")},
    "suite24-words": {
        **_SUITE24,
        "tasks": WORDS,
        "episodes": 25,
        "conditions": named("control"),
    },
}
"""Named protocols. suite24-v2 redraws scenes whose goal is hidden. suite24-plus has 7 axes x 5
levels and two controls of language, suite24-dynamics the second table, and suite24-words scenes in
which only the words decide, with the same controls."""
