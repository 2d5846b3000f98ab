"""Evaluation protocols as data: two results can be compared only when their protocols are equal.

The ranges of scene seeds (`blm.seeds`) are disjoint: no evaluation scene was trained on, and none
helped to choose a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import product
from typing import Any, Literal, Unpack, get_args

from blm.evaluation.conditions import OTHER_TASK, PLAIN, Condition
from blm.evaluation.named_protocols import (
    PROTOCOLS,
    Latency,
    Phrasing,
    ProtocolOverrides,
    ProtocolSettings,
)
from blm.seeds import EVALUATION_SEEDS, VALIDATION_SEEDS
from blm.tasks.eef_env import control_of
from blm.tasks.suite import suite_version
from blm.tasks.suite_plus import table_hash
from blm.tasks.wordings import TEST_WORDINGS
from blm.types import BlmError, ContractError, Episode, PolicyContract, lookup

_FROM_CONTRACT = ("cameras", "image_size", "rate_hz", "execute")
_OPTIONAL = ("conditions", "perturbations", "wordings", "visible_goals")
"""Fields that are in a protocol's JSON form only if they are not empty."""
Purpose = Literal["evaluation", "validation", "replay check"]
Scene = tuple[str, str, int]
"""Robot, task and seed."""


@dataclass(frozen=True)
class EpisodeKey:
    """One episode of a protocol."""

    robot: str
    task: str
    seed: int
    condition: Condition = PLAIN

    @property
    def twin(self) -> str:
        """Identifier of the unperturbed episode of the same scene: "robot/task/seed"."""
        return f"{self.robot}/{self.task}/{self.seed}"

    @property
    def id(self) -> str:
        """Identifier: that of the twin, and the condition if it has one."""
        label = self.condition.label
        return f"{self.twin}/{label}" if label else self.twin


@dataclass(frozen=True, kw_only=True)
class PhysicalProtocol:
    """Closed-loop episodes. Build it with `for_policy`, `named` or `for_replay`."""

    name: str = ""
    """Entry of PROTOCOLS that this protocol equals; empty for none."""
    purpose: Purpose = "evaluation"
    """A validation chooses among the checkpoints of a training run. A replay check executes
    recorded training episodes again: it tests the data and the simulator and is not a score."""
    robots: tuple[str, ...]
    tasks: tuple[str, ...]
    first_seed: int = 0
    episodes: int
    """Number of episodes per robot, task and condition; their seeds start at `first_seed`.

    Level l of an axis has the l-th range of so many seeds. Every scene of a condition is also run
    once without it, as its twin.
    """
    recorded: tuple[Scene, ...] = ()
    """Robot, task and seed of each episode of a replay check; they replace the seeds above."""
    max_steps: int = 200
    settle_steps: int = 10
    """Number of steps after the first success at which success_at_end is judged.

    An evaluation then continues to max_steps, where success_at_limit is judged: does the policy
    leave the solved task alone?
    """
    phrasing: Phrasing = "seen"
    """Wording of the instructions: "seen", "held_out" or "both".

    Seen wordings are those of training, drawn by the scene's seed. With "both", even seeds use seen
    wordings and odd seeds held-out wordings.
    """
    latency: Latency = "none"
    """"none": the simulation waits for the policy. Otherwise it continues, and an action chunk
    arrives this many seconds after its observation: a fixed number, or the duration of the call
    ("measured", which depends on the machine and its load)."""
    rate_hz: float
    cameras: tuple[str, ...]
    image_size: int
    execute: int
    """Number of actions of each chunk that are executed before the next observation is sent."""
    simulator: str = field(default_factory=lambda: f"mujoco {version('mujoco')}")
    suite: str
    success_rule: str = "once: the task's rule holds after some step; at end: it holds after the last step"
    conditions: tuple[Condition, ...] = ()
    """Conditions under which scenes are run in addition to their unperturbed twins."""
    perturbations: str = ""
    """Hash of the tables that define the conditions' variations; empty if there are none."""
    wordings: str = ""
    """Hash of the wordings of the conditions of language; empty if there are none."""
    visible_goals: bool = False
    """Whether a scene with a hidden goal is drawn again; see `blm.tasks.visibility`."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the unperturbed episodes of each robot and task."""
        return tuple(sorted({seed for one in self.conditions or (PLAIN,) for seed in self.seeds_of(one)}))

    def seeds_of(self, condition: Condition) -> range:
        """Return the seeds of the episodes of a condition, for each robot and task."""
        first = self.first_seed + self.episodes * max(condition.level - 1, 0)
        return range(first, first + self.episodes)

    @property
    def keys(self) -> list[EpisodeKey]:
        """Every episode, cell after cell, in each cell the unperturbed ones first."""
        if self.recorded:
            return [EpisodeKey(*scene) for scene in self.recorded]
        cell = [(seed, PLAIN) for seed in self.seeds]
        cell += [(seed, condition) for condition in self.conditions for seed in self.seeds_of(condition)]
        cells = product(self.robots, self.tasks)
        return [EpisodeKey(robot, task, *one) for robot, task in cells for one in cell]

    def __post_init__(self) -> None:
        if (self.purpose == "replay check") != bool(self.recorded):
            raise BlmError("only a replay check has recorded episodes, and it needs them; use for_replay")
        if not self.recorded:
            seeds = self.seeds or (-1,)
            valid = VALIDATION_SEEDS if self.purpose == "validation" else EVALUATION_SEEDS
            if seeds[0] not in valid or seeds[-1] not in valid:
                raise BlmError(
                    f"{self.episodes} {self.purpose} seeds from {self.first_seed}: need one or more, all "
                    f"within {valid.start}..{valid.stop - 1}; other seeds are for training"
                )
        if self.simulator.startswith("maniskill"):
            require_no_variation(self.conditions, self.visible_goals)
        if self.visible_goals and any(condition.needs_variation for condition in self.conditions):
            raise BlmError("visible_goals draws scenes by their plain looks: give it no perturbed axes")
        if len({*self.conditions}) != len(self.conditions) or PLAIN in self.conditions:
            raise BlmError("the conditions of a protocol must differ, and none may be plain")
        fixed = isinstance(self.latency, int | float) and 0 <= self.latency < math.inf
        if not fixed and self.latency not in ("none", "measured"):
            raise BlmError(
                f"latency {self.latency!r} must be 'none', 'measured' or a number of seconds, 0 or more"
            )
        if self.phrasing not in get_args(Phrasing):
            raise BlmError(f"phrasing {self.phrasing!r} must be seen, held_out or both")
        for option, least in (("max_steps", 1), ("execute", 1), ("settle_steps", 0)):
            if (value := getattr(self, option)) < least:
                raise BlmError(f"{option} is {value}, must be {least} or more")

    @classmethod
    def for_policy(cls, contract: PolicyContract, **settings: Unpack[ProtocolSettings]) -> PhysicalProtocol:
        """Return the protocol for a policy; `settings` are the remaining fields."""
        return cls._make(contract, "", settings)

    @classmethod
    def named(
        cls, name: str, contract: PolicyContract, **changes: Unpack[ProtocolOverrides]
    ) -> PhysicalProtocol:
        """Return the entry `name` of PROTOCOLS for a policy. A changed protocol has no name.

        Raises UnknownNameError, which lists the valid names.
        """
        standard = cls._make(contract, name, lookup("protocol", name, PROTOCOLS))
        changed = cls._make(contract, "", {**PROTOCOLS[name], **changes})
        return standard if replace(changed, name=name) == standard else changed

    @classmethod
    def for_validation(
        cls, contract: PolicyContract, *, tasks: Sequence[str], episodes: int
    ) -> PhysicalProtocol:
        """Return the protocol of a closed-loop validation; `episodes` are per robot and task."""
        settings: ProtocolSettings = {
            "robots": tuple(contract.action_spaces),
            "tasks": tasks,
            "episodes": episodes,
        }
        settings["first_seed"] = VALIDATION_SEEDS.start
        return cls._make(contract, "", settings, purpose="validation")

    @classmethod
    def for_replay(cls, contract: PolicyContract, episodes: Sequence[Episode]) -> PhysicalProtocol:
        """Return the replay check of recorded episodes.

        Raises BlmError for no episodes, or two of one scene.
        """
        recorded = tuple((e.robot, e.task, e.seed) for e in episodes)
        if not recorded or len(set(recorded)) != len(recorded):
            raise BlmError(f"a replay check needs recorded episodes, each scene once; got {len(recorded)}")
        settings: ProtocolSettings = {
            "robots": tuple(dict.fromkeys(robot for robot, _, _ in recorded)),
            "tasks": tuple(dict.fromkeys(task for _, task, _ in recorded)),
            "episodes": max(Counter(scene[:2] for scene in recorded).values()),
            "first_seed": min(seed for _, _, seed in recorded),
            "max_steps": max(len(episode) for episode in episodes),
        }
        return cls._make(contract, "", settings, purpose="replay check", recorded=recorded)

    @classmethod
    def _make(
        cls,
        contract: PolicyContract,
        name: str,
        settings: ProtocolSettings,
        purpose: Purpose = "evaluation",
        recorded: tuple[Scene, ...] = (),
    ) -> PhysicalProtocol:
        robots, tasks = tuple(settings["robots"]), tuple(settings["tasks"])
        fields: dict[str, Any] = {**settings, "robots": robots, "tasks": tasks}
        fields |= {field: getattr(contract, field) for field in _FROM_CONTRACT}
        conditions = fields["conditions"] = tuple(settings.get("conditions", ()))
        if any(condition.needs_variation for condition in conditions):
            fields["perturbations"] = table_hash()
        fields["wordings"] = _wordings_hash(tasks, conditions)
        suite = suite_version(robots, tasks, visible_goals=settings.get("visible_goals", False))
        return cls(name=name, purpose=purpose, recorded=recorded, suite=suite, **fields)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, of which `protocol_hash` is the hash."""
        value = {**asdict(self), "conditions": [condition.to_json() for condition in self.conditions]}
        return {name: part for name, part in value.items() if part or name not in _OPTIONAL}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PhysicalProtocol:
        """Read `to_json`. Raises TypeError for unknown fields."""
        lists = ("robots", "tasks", "cameras")
        fields = {**value, **{name: tuple(value[name]) for name in lists}}
        fields["recorded"] = tuple((robot, task, seed) for robot, task, seed in value["recorded"])
        fields["conditions"] = tuple(Condition(**one) for one in value.get("conditions", ()))
        return cls(**fields)

    def require_fits(self, contract: PolicyContract) -> None:
        """Raise ContractError, which prints both sides, unless the protocol fits the contract."""
        for robot in self.robots:
            space = lookup("robot of this policy", robot, contract.action_spaces)
            if control_of(robot, space, "the policy") == "eef" and self.simulator.startswith("maniskill"):
                raise ContractError(
                    "ManiSkill executes joint targets only, and the policy's actions are poses of the tool: "
                    "use the simulator mujoco"
                )
        ours, theirs = ({name: getattr(side, name) for name in _FROM_CONTRACT} for side in (self, contract))
        require_equal(ours, theirs, "protocol and policy differ", "in the policy")


def require_no_variation(conditions: Sequence[Condition], visible_goals: bool) -> None:
    """Raise BlmError, which names them, for what ManiSkill's scenes cannot show."""
    axes = list(dict.fromkeys(c.axis for c in conditions if c.needs_variation))
    axes += ["visible goals"] if visible_goals else []
    if axes:
        raise BlmError(
            f"ManiSkill's scenes cannot be varied, and the protocol varies {', '.join(axes)}: use the "
            "simulator mujoco, or a protocol without conditions"
        )


def _wordings_hash(tasks: Sequence[str], conditions: Sequence[Condition]) -> str:
    """Return the hash of the wordings that these conditions give to tasks; empty for none."""
    data: list[Any] = []
    if any(condition.axis == "language" for condition in conditions):
        tests = {task: lookup("task with test wordings", task, TEST_WORDINGS) for task in tasks}
        data.append({task: sorted(levels.items()) for task, levels in tests.items()})
    if any(condition.is_control for condition in conditions):
        data.append({task: OTHER_TASK.get(task, "") for task in tasks})
    return digest(data) if data else ""


def phrasing_of(protocol: PhysicalProtocol, seed: int) -> Literal["seen", "held_out"]:
    """Return the wording of the instruction of one episode: "seen" or "held_out"."""
    if protocol.phrasing == "both":
        return "held_out" if seed % 2 else "seen"
    return protocol.phrasing


@dataclass(frozen=True, kw_only=True)
class DigitalProtocol:
    """A benchmark of questions with one answer each."""

    benchmark: str = "scene"
    items: str
    """Hash of the questions, images and reference answers."""
    count: int
    max_tokens: int
    long: Mapping[str, int] = field(default_factory=dict)
    """Kind of question -> its own limit of answer tokens."""
    prompt: str
    """System message put before each question; empty for none."""
    average: Literal["items", "kinds"] = "items"
    """Definition of the headline score: mean over questions, or unweighted mean over the kinds."""
    parser: str = "3"
    """Version of the rules in digital/parsers/ and digital/scoring.py."""
    compat: str = ""
    """Upstream parser that read the answers instead of ours (digital/parsers/compat.py)."""
    point_radius: float = 50.0
    """A point is correct within this distance of the reference [thousandths of the sides]."""
    box_overlap: float = 0.5
    """A box is correct if its intersection over union with the reference is at least this."""
    metric_radius: float = 2.0
    """A length or vector is correct within this distance of the reference [cm]."""
    judge: str = ""
    """Model that graded free-form answers; empty for none."""
    judge_prompt: str = ""
    """Hash of the judge's prompt."""
    thinking: bool = False
    """Whether the model thought before it answered; `max_tokens` then includes the thoughts."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, of which `protocol_hash` is the hash. `thinking` is in it only if it
        is true, so that older results without it stay comparable."""
        return {key: value for key, value in asdict(self).items() if key != "thinking" or value}


def protocol_hash(protocol: PhysicalProtocol | DigitalProtocol) -> str:
    return digest(protocol.to_json())


def digest(value: Any) -> str:
    """Return a short hash of JSON-serialisable data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def require_equal(ours: Mapping[str, Any], theirs: Mapping[str, Any], problem: str, there: str) -> None:
    """Raise ContractError, which prints both sides of every key that differs, unless all are equal."""
    unlike = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    if unlike:
        rows = [f"\n  {key}: {ours.get(key)!r} here, {theirs.get(key)!r} {there}" for key in unlike]
        raise ContractError(f"{problem}:{''.join(rows)}")
