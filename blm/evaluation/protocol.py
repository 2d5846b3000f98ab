"""What a score was measured with, as data. Two results compare only when their protocols are equal.

This module is the only place that states the three ranges of scene seeds. They are disjoint, so no evaluation
scene was ever trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Literal

from blm.robots import ROBOTS
from blm.tasks import TASKS
from blm.types import BlmError, ContractError, PolicyContract, lookup

EVALUATION_SEEDS = range(10_000)
TRAINING_SEEDS = range(10_000, 1_000_000)
STAGE1_HELD_OUT_SEEDS = range(1_000_000, 2_000_000)

SUITE_VERSION = "1"
"""Raise it when a success rule or the physics changes; sizes, regions and wordings are hashed anyway."""


@dataclass(frozen=True, kw_only=True)
class PhysicalProtocol:
    """Closed-loop episodes: every robot x task x seed once. Build it with `for_policy`."""

    robots: tuple[str, ...]
    tasks: tuple[str, ...]
    first_seed: int
    episodes: int
    """Per robot and task; their seeds follow `first_seed`."""
    max_steps: int
    settle_steps: int
    """An episode goes on for so many steps after its first success; then success_at_end is judged."""
    phrasing: Literal["seen", "held_out"]
    """Instructions as in training (drawn by the scene's seed), or worded as never in training."""
    rate_hz: float
    cameras: tuple[str, ...]
    image_size: int
    execute: int
    """Actions of each chunk that are carried out before the policy is asked again."""
    simulator: str
    suite: str
    success_rule: str = "once: the task's rule holds after some step; at end: it holds after the last step"

    def __post_init__(self) -> None:
        last = self.first_seed + self.episodes - 1
        if self.episodes < 1 or self.first_seed not in EVALUATION_SEEDS or last not in EVALUATION_SEEDS:
            raise BlmError(
                f"{self.episodes} evaluation seeds from {self.first_seed} on: need one or more, all within "
                f"0..{EVALUATION_SEEDS.stop - 1}; the others belong to training"
            )

    @classmethod
    def for_policy(
        cls,
        contract: PolicyContract,
        *,
        robots: Sequence[str],
        tasks: Sequence[str],
        episodes: int,
        first_seed: int = 0,
        max_steps: int = 200,
        phrasing: Literal["seen", "held_out"] = "seen",
    ) -> PhysicalProtocol:
        """The protocol that suits a policy: its cameras, image size, rate and execution horizon."""
        return cls(
            robots=tuple(robots),
            tasks=tuple(tasks),
            first_seed=first_seed,
            episodes=episodes,
            max_steps=max_steps,
            settle_steps=10,
            phrasing=phrasing,
            rate_hz=contract.rate_hz,
            cameras=contract.cameras,
            image_size=contract.image_size,
            execute=contract.execute,
            simulator=f"mujoco {version('mujoco')}",
            suite=f"{SUITE_VERSION}-{_suite_digest(robots, tasks)}",
        )

    def require_fits(self, contract: PolicyContract) -> None:
        """Raise ContractError that prints both sides unless a policy with this contract can be evaluated."""
        for robot in self.robots:
            space = lookup("robot of this policy", robot, contract.action_spaces)
            lookup("robot", robot, ROBOTS).action_space.require_same(space, "the policy")
        rows = [
            f"  {name}: {getattr(self, name)!r} here, {getattr(contract, name)!r} in the policy"
            for name in ("cameras", "image_size", "rate_hz", "execute")
            if getattr(self, name) != getattr(contract, name)
        ]
        if rows:
            raise ContractError("protocol and policy differ:\n" + "\n".join(rows))


@dataclass(frozen=True, kw_only=True)
class DigitalProtocol:
    """Questions with one answer each."""

    benchmark: str
    items: str
    """Hash of the questions, pictures and reference answers."""
    count: int
    max_tokens: int
    prompt: str
    """System message put before each question; empty for none."""
    parser: str
    point_radius: float
    """A point is correct within this distance of the reference, in thousandths of the image's sides."""


def protocol_hash(protocol: PhysicalProtocol | DigitalProtocol) -> str:
    return digest(asdict(protocol))


def digest(value: Any) -> str:
    """Short hash of JSON-able data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _suite_digest(robots: Sequence[str], tasks: Sequence[str]) -> str:
    arms = [lookup("robot", name, ROBOTS) for name in robots]
    specs = [lookup("task", name, TASKS) for name in tasks]
    words = [[spec.phrasings, spec.held_out_phrasings] for spec in specs]
    return digest([words, repr(arms), [repr(spec.items(arm)) for spec in specs for arm in arms]])[:8]
