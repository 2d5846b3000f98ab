"""What a score was measured with, as data. Two results compare only when their protocols are equal.

The three ranges of scene seeds are stated only here. They are disjoint: no evaluation scene was trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Literal

from blm.robots import ROBOTS
from blm.tasks import TASKS
from blm.types import BlmError, ContractError, PolicyContract, lookup

EVALUATION_SEEDS = range(10_000)
TRAINING_SEEDS = range(10_000, 1_000_000)
STAGE1_HELD_OUT_SEEDS = range(1_000_000, 2_000_000)

_OF_POLICY = ("cameras", "image_size", "rate_hz", "execute")
SUITE_VERSION = "1"
"""Raise it when a success rule or the physics changes; sizes, regions and wordings are hashed anyway."""


@dataclass(frozen=True, kw_only=True)
class PhysicalProtocol:
    """Closed-loop episodes: every robot x task x seed once. Build it with `for_policy`."""

    robots: tuple[str, ...]
    tasks: tuple[str, ...]
    first_seed: int = 0
    episodes: int
    """Per robot and task; their seeds follow `first_seed`."""
    max_steps: int = 200
    settle_steps: int = 10
    """An episode goes on for so many steps after its first success; then success_at_end is judged."""
    phrasing: Literal["seen", "held_out"] = "seen"
    """Instructions as in training (drawn by the scene's seed), or worded as never in training."""
    rate_hz: float
    cameras: tuple[str, ...]
    image_size: int
    execute: int
    """Actions of each chunk that are carried out before the policy is asked again."""
    simulator: str = field(default_factory=lambda: f"mujoco {version('mujoco')}")
    suite: str
    success_rule: str = "once: the task's rule holds after some step; at end: it holds after the last step"

    @property
    def seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.episodes)

    def __post_init__(self) -> None:
        seeds = self.seeds
        if not seeds or seeds[0] not in EVALUATION_SEEDS or seeds[-1] not in EVALUATION_SEEDS:
            raise BlmError(
                f"{self.episodes} evaluation seeds from {self.first_seed} on: need one or more, all within "
                f"0..{EVALUATION_SEEDS.stop - 1}; the others belong to training"
            )

    @classmethod
    def for_policy(
        cls, contract: PolicyContract, *, robots: Sequence[str], tasks: Sequence[str], **others: Any
    ) -> PhysicalProtocol:
        """The protocol that suits a policy; `others` are fields that the policy leaves open."""
        fitting = {name: getattr(contract, name) for name in _OF_POLICY}
        suite = f"{SUITE_VERSION}-{_suite_digest(robots, tasks)}"
        return cls(robots=tuple(robots), tasks=tuple(tasks), suite=suite, **fitting, **others)

    def require_fits(self, contract: PolicyContract) -> None:
        """Raise ContractError that prints both sides unless a policy with this contract can be evaluated."""
        for robot in self.robots:
            space = lookup("robot of this policy", robot, contract.action_spaces)
            lookup("robot", robot, ROBOTS).action_space.require_same(space, "the policy")
        ours, theirs = ({name: getattr(side, name) for name in _OF_POLICY} for side in (self, contract))
        require_equal(ours, theirs, "protocol and policy differ", "in the policy")


@dataclass(frozen=True, kw_only=True)
class DigitalProtocol:
    """Questions with one answer each."""

    benchmark: str = "scene"
    items: str
    """Hash of the questions, pictures and reference answers."""
    count: int
    max_tokens: int
    prompt: str
    """System message put before each question; empty for none."""
    parser: str = "1"
    """Version of the rules in digital/scoring.py."""
    point_radius: float = 50.0
    """A point is correct within this distance of the reference, in thousandths of the image's sides."""


def protocol_hash(protocol: PhysicalProtocol | DigitalProtocol) -> str:
    return digest(asdict(protocol))


def digest(value: Any) -> str:
    """Short hash of JSON-able data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def require_equal(ours: Mapping[str, Any], theirs: Mapping[str, Any], problem: str, there: str) -> None:
    """Raise ContractError that prints both sides of every key that differs."""
    unlike = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    if unlike:
        rows = [f"\n  {key}: {ours.get(key)!r} here, {theirs.get(key)!r} {there}" for key in unlike]
        raise ContractError(f"{problem}:{''.join(rows)}")


def _suite_digest(robots: Sequence[str], tasks: Sequence[str]) -> str:
    arms = [lookup("robot", name, ROBOTS) for name in robots]
    specs = [lookup("task", name, TASKS) for name in tasks]
    words = [[spec.phrasings, spec.held_out_phrasings] for spec in specs]
    return digest([words, repr(arms), [repr(spec.items(arm)) for spec in specs for arm in arms]])[:8]
