"""Collects demonstrations for all robots and tasks in parallel; a killed run resumes.

One attempt is one work unit with the key robot/task/seed. It stages its episode, or returns the reason
for its rejection, and then the next seed is tried. The same configuration gives the same vectors, bit
for bit, on one machine.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from itertools import product
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
from rich.console import Console

from blm.datasets.lerobot import finalize_dataset, stage_episode
from blm.io import MARK, lock_folder, read_json, remove_own, work_folder, write_json
from blm.jobs import MAX_WORKERS, Result, WorkUnit, run_units
from blm.planner.collection_summary import SUMMARY, CellCounts, CollectionSummary
from blm.planner.decompositions import DECOMPOSITIONS
from blm.planner.demonstration import TAKE_OVER, Demonstrator, Perturbation, demonstrate
from blm.planner.expert import HOLD_STEPS, Expert
from blm.robots import ROBOTS
from blm.robots.eef import EefKinematics
from blm.seeds import count_reserved_seeds, reserved_seeds_warning
from blm.tasks import SUITE24, Env, TaskEnv
from blm.tasks.eef_env import CONTROLS, Control, as_poses, space_of
from blm.tasks.randomization import NO_RANDOMIZATION, DomainRandomization
from blm.tasks.scene import CAMERAS
from blm.tasks.suite import suite_version
from blm.types import BlmError, Episode, Policy, Training, lookup, require_numbers

MakePolicy = Callable[[], Policy]
"""Picklable; called once in each worker process."""
PLANNING = ("mink", "toppra", "ompl", "numpy")
"""Packages whose versions determine the expert's actions."""
STAGING, JOURNAL = ".staging", "journal.jsonl"
_NOT_DATA = ("workers", "engine")
"""Fields that do not affect the data, so an interrupted run may resume with other values."""


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Which demonstrations to record, and how."""

    robots: tuple[str, ...] = tuple(ROBOTS)
    """Names of the robots."""
    tasks: tuple[str, ...] = SUITE24
    """Names of the tasks."""
    episodes: int = 50
    """Number of successful episodes to keep for each robot and task."""
    first_seed: int = 10_000
    """Seed of the first scene; the following scenes use consecutive seeds."""
    cameras: tuple[str, ...] = ("base", "side", "wrist")
    """Cameras whose images are recorded."""
    image_size: int = 112
    """Width and height of the camera images [px]; must be even."""
    noise: tuple[float, ...] = (0.0, 0.01, 0.02)
    """Standard deviations of the noise added to executed joint targets [rad].
    Each episode draws one of them; the recorded targets are free of noise."""
    disturbed: float = 0.15
    """Fraction of episodes in which the gripper command is briefly inverted, 0..1.
    The demonstrations then contain misses, drops and recoveries."""
    random_starts: float = 0.3
    """Fraction of episodes that start away from the home pose, 0..1."""
    hold: int = HOLD_STEPS
    """Number of control steps at the end of each episode in which the arm stays at the goal.
    A policy learns to stay from steps at least one chunk before the end of an episode."""
    take_over: tuple[int, int] = TAKE_OVER
    """Range of the number of control steps that a policy controls before the expert takes over.
    It applies to corrections only. Late steps show what follows a success or a failure."""
    distractors: int = 0
    """Number of coloured distractor objects in each scene that nothing collides with."""
    randomization: DomainRandomization = NO_RANDOMIZATION
    """Randomisation of looks, cameras, layout, sensors and start."""
    actions: Control = "joint"
    """What states and actions are: joint positions [rad], or poses of the tool in the base frame (eef:
    position [m] and two columns of the rotation); then the gripper opening."""
    simulator: Literal["mujoco", "maniskill"] = "mujoco"
    """Simulator; `maniskill` needs a separate Python environment (docs/maniskill.md)."""
    workers: int = 2
    """Number of worker processes; 0 runs all work in the main process."""
    engine: Literal["local", "ray"] = "local"
    """Where the episodes run: on this machine, or on a Ray cluster."""

    @property
    def package(self) -> str:
        """Distribution name of the simulator."""
        return "mani_skill" if self.simulator == "maniskill" else "mujoco"

    @property
    def training(self) -> Training:
        """The record of policies that are trained on these demonstrations."""
        varied = self.distractors or self.randomization != NO_RANDOMIZATION
        return "randomized" if varied else "plain"

    def __post_init__(self) -> None:
        for robot in self.robots:
            lookup("robot", robot, ROBOTS)
        for task in self.tasks:
            lookup("task", task, DECOMPOSITIONS)
        for camera in self.cameras:
            lookup("camera", camera, CAMERAS)
        require_numbers(
            self,
            episodes=(1, 1_000_000),
            first_seed=(0, 2**32 - 1),
            image_size=(16, 4096),
            noise=(0, 1),
            disturbed=(0, 1),
            random_starts=(0, 1),
            distractors=(0, 100),
            workers=(0, MAX_WORKERS),
            hold=(HOLD_STEPS, 100_000),
            take_over=(1, 100_000),
        )
        if self.take_over[0] >= self.take_over[1]:
            raise BlmError(f"take_over is {self.take_over}; the first number must be below the second")
        if not self.noise or self.image_size % 2:
            raise BlmError(
                "collecting needs at least one noise level and an even image_size; got "
                f"{self.noise}, {self.image_size}"
            )
        if self.simulator == "maniskill" and (self.random_starts or self.disturbed or max(self.noise) > 0.01):
            raise BlmError(
                "ManiSkill's scripts do not react: set random_starts 0, disturbed 0, noise up to 0.01"
            )
        lookup("kind of actions", self.actions, dict.fromkeys(CONTROLS))
        if self.actions == "eef" and self.simulator == "maniskill":
            raise BlmError("with ManiSkill's scripts actions are joint targets: set actions joint")
        if self.hold > HOLD_STEPS and self.simulator == "maniskill":
            raise BlmError(f"with ManiSkill's scripts hold must be {HOLD_STEPS}, got {self.hold}")


def collect(config: CollectConfig, out: Path, pilot: MakePolicy | None = None) -> CollectionSummary:
    """Collect one LeRobotDataset v3.0 per robot, `out/<robot>/`; write and return the summary.

    With a `pilot`, that policy controls the first steps of every episode and the expert completes
    it. The expert's actions are the labels from the first step on: corrections on states that the
    policy visits.

    After a kill, the same call resumes; after the end, it returns the summary. Raises BlmError if `out`
    contains a collection of another configuration or files that would be replaced, if another process
    collects there, or if a cell (robot and task) fails too often.
    """
    wanted = {k: v for k, v in json.loads(json.dumps(asdict(config))).items() if k not in _NOT_DATA}
    if config.actions == "joint":  # as in collections of before there were others
        del wanted["actions"]
    wanted["pilot"] = pilot().contract.revision if pilot else None
    with lock_folder(out):
        _claim(out, config, wanted)
        if not (out / SUMMARY).exists():
            _make(config, out, wanted, pilot)
        if (out / STAGING).exists() and not remove_own(out / STAGING, _is_staged):
            Console(stderr=True).print(
                f"'{out / STAGING}' has files of other programs, which are kept", soft_wrap=True
            )
        (out / JOURNAL).unlink(missing_ok=True)
    return CollectionSummary.read(out)


def _make(config: CollectConfig, out: Path, wanted: Mapping[str, Any], pilot: MakePolicy | None) -> None:
    """Run all attempts that are missing, then write the datasets and the summary."""
    began = time.monotonic()
    staging = work_folder(out / STAGING, "staged episodes", wanted)
    results = _attempt_all(config, out / JOURNAL, staging, pilot)
    seeds = [int(key.split("/")[2]) for key in results]
    versions = {name: version(name) for name in ("blm", config.package, *PLANNING)}
    suite = suite_version(config.robots, config.tasks)
    provenance = {
        "versions": versions,
        "suite": suite,
        "seeds": [min(seeds), max(seeds)],
        "training": config.training,
        "collect": wanted,
    }
    for robot in config.robots:
        kept = [k for k, result in results.items() if k.startswith(f"{robot}/") and result["kept"]]
        finalize_dataset(
            [staging / key for key in kept],
            out / robot,
            space=space_of(ROBOTS[robot], config.actions),
            cameras=config.cameras,
            image_size=config.image_size,
            provenance=provenance,
        )
    parts: Counter[str] = Counter()
    for result in results.values():
        parts.update(result["seconds"])
    summary = CollectionSummary(
        robots={r: {t: _count(results, r, t) for t in config.tasks} for r in config.robots},
        seconds=round(time.monotonic() - began, 1),
        seconds_in={part: round(seconds, 1) for part, seconds in parts.items()},
        versions=versions,
        suite=suite,
        seeds=(min(seeds), max(seeds)),
        reserved_seeds=count_reserved_seeds(
            int(k.split("/")[2]) for k, result in results.items() if result["kept"]
        ),
        config=wanted,
    )
    write_json(out / SUMMARY, summary.to_json())


def _is_staged(name: PurePath) -> bool:
    """Return whether a file below the staging folder is one that `stage_episode` writes."""
    return name.suffix == ".mp4" or name.name in ("episode.json", "vectors.npz", MARK)


def _claim(out: Path, config: CollectConfig, wanted: Mapping[str, Any]) -> None:
    """Claim `out` for this collection.

    Raises BlmError if it belongs to another collection, or contains files that would be replaced.
    """
    claim = out / "collect.json"
    ours = (*config.robots, SUMMARY, "verified.json", JOURNAL, STAGING)
    taken = [name for name in ours if os.path.lexists(out / name)]
    if taken and not claim.exists():
        raise BlmError(
            f"'{out}' has {', '.join(taken)}, which no collection of this program left there (it has no "
            "collect.json); nothing was written: name another folder, or move that away"
        )
    have = read_json(claim) if claim.exists() else {}
    have = have if isinstance(have, dict) else {}
    rows = [f"  {k}: {have.get(k)!r} there, {v!r} asked for" for k, v in wanted.items() if have.get(k) != v]
    if rows and claim.exists() and (taken or {*have} - {*wanted}):
        raise BlmError(
            f"'{out}' holds a collection with another configuration; name another folder, or move it away:\n"
            + "\n".join(rows)
        )
    if rows:  # nothing was collected yet
        write_json(claim, wanted)
    counts = count_reserved_seeds(range(config.first_seed, config.first_seed + config.episodes))
    if {*counts} - {"held-out questions"}:  # which recipes collect, and never train on
        Console(stderr=True).print(f"warning: {reserved_seeds_warning(str(out), counts)}", soft_wrap=True)


def _attempt_all(
    config: CollectConfig, journal: Path, staging: Path, pilot: MakePolicy | None
) -> dict[str, Result]:
    """Run attempts until every cell (robot and task) has its episodes; return key -> result of all."""
    limit = 3 * config.episodes + 10
    tried = dict.fromkeys(product(config.robots, config.tasks), config.episodes)
    while True:
        units = [
            WorkUnit(f"{robot}/{task}/{seed}", (config, robot, task, seed, staging, pilot))
            for (robot, task), count in tried.items()
            for seed in range(config.first_seed, config.first_seed + count)
        ]
        how: Any = {"workers": config.workers, "engine": config.engine, "title": "collecting"}
        results = run_units(_attempt, units, journal=journal, **how)
        counts = {cell: _count(results, *cell) for cell in tried}
        missing = {cell: config.episodes - count.kept for cell, count in counts.items()}
        if not any(missing.values()):
            return results
        for cell, lacking in missing.items():
            if lacking and tried[cell] >= limit:
                raise BlmError(_why(*cell, counts[cell], config.episodes))
            tried[cell] = min(tried[cell] + lacking, limit)


def _why(robot: str, task: str, count: CellCounts, wanted: int) -> str:
    """Return the error message for a cell with too few successful episodes."""
    reasons = count.rejected
    worst = max(reasons, key=lambda reason: reasons[reason])
    advice = (
        f"the spawn region is out of the arm's reach: change TaskSpec.regions['{robot}'] of '{task}'"
        if worst == "unreachable"
        else "lower noise or disturbed"
    )
    return (
        f"{robot} {task}: {count.attempts} attempts gave {count.kept} of {wanted} episodes; "
        f"rejected: {reasons}; {advice}"
    )


def _count(results: Mapping[str, Result], robot: str, task: str) -> CellCounts:
    """Count attempts, kept episodes, rejections and frames of one robot and task."""
    mine = [result for key, result in results.items() if key.startswith(f"{robot}/{task}/")]
    return CellCounts(
        attempts=len(mine),
        kept=sum(result["kept"] for result in mine),
        rejected=dict(sorted(Counter(r["reason"] for r in mine if not r["kept"]).items())),
        frames=sum(result.get("frames", 0) for result in mine),
    )


def _attempt(payload: tuple[CollectConfig, str, str, int, Path, MakePolicy | None]) -> Result:
    """Run one work unit: demonstrate, check and stage one episode."""
    config, robot, task, seed, staging, make_pilot = payload
    expert, pilot = _expert(config, robot, task), _pilot(make_pilot) if make_pilot else None
    if make_pilot:
        _check_pilot(make_pilot, config, robot, task)
    rng = np.random.default_rng((seed, 1))
    draw = draw_perturbation(config, rng, piloted=pilot is not None)
    before = dict(expert.env.seconds)
    episode, reason = demonstrate(expert, seed, draw, rng, pilot)
    seconds = {part: total - before[part] for part, total in expert.env.seconds.items()}
    seconds["planning"] = expert.planning_seconds
    if episode is None:
        return {"kept": False, "reason": reason, "seconds": seconds}
    began = time.perf_counter()
    if config.actions == "eef":
        episode = _with_poses(episode)
    stage_episode(staging, f"{robot}/{task}/{seed}", episode)
    seconds["encoding"] = time.perf_counter() - began
    return {"kept": True, "frames": len(episode), "seconds": seconds}


def _with_poses(episode: Episode) -> Episode:
    """Return an episode whose states and actions are poses of the tool, by the robot's kinematics."""
    assert episode.executed is not None
    convert = partial(as_poses, _kinematics(episode.robot))
    return replace(
        episode,
        states=convert(episode.states),
        actions=convert(episode.actions),
        executed=convert(episode.executed),
    )


@cache
def _kinematics(robot: str) -> EefKinematics:
    return EefKinematics(ROBOTS[robot])


def draw_perturbation(config: CollectConfig, rng: np.random.Generator, piloted: bool = False) -> Perturbation:
    """Draw the disturbances of one episode; there are none if a policy drives it."""
    sigma = float(rng.choice(config.noise))
    pulse = int(rng.integers(5, 40)) if rng.random() < config.disturbed else None
    start = rng.random() < config.random_starts
    if piloted:
        take_over = int(rng.integers(*config.take_over))
        return Perturbation(sigma=0.0, pulse=None, random_start=False, take_over=take_over)
    return Perturbation(sigma=sigma, pulse=pulse, random_start=bool(start), take_over=0)


@cache
def _expert(config: CollectConfig, robot: str, task: str) -> Demonstrator:
    """Return the expert of a cell, cached per process: creating one costs as much as several episodes."""
    return make_expert(config, robot, task)


@cache
def _pilot(make: MakePolicy) -> Policy:
    return make()


@cache
def _check_pilot(make: MakePolicy, config: CollectConfig, robot: str, task: str) -> None:
    """Raise ContractError, once per cell and process, if the pilot needs other images."""
    _pilot(make).contract.check(_expert(config, robot, task).env.observation())


def make_env(config: CollectConfig, robot: str, task: str, cameras: tuple[str, ...]) -> TaskEnv:
    """Return the environment of this configuration with the given cameras."""
    env_class: type[TaskEnv] = Env
    if config.simulator == "maniskill":
        from blm.tasks.maniskill import ManiSkillEnv

        env_class = ManiSkillEnv
    return env_class(
        robot,
        task,
        cameras=cameras,
        image_size=config.image_size,
        terminate_on_success=False,
        distractors=config.distractors,
        randomization=config.randomization,
    )


def make_expert(config: CollectConfig, robot: str, task: str) -> Demonstrator:
    """Return the expert of one cell, with the environment that it records."""
    env = make_env(config, robot, task, config.cameras)
    rng = np.random.default_rng(0)
    if not isinstance(env, Env):
        from blm.planner.maniskill import ManiSkillEnv, ManiSkillExpert

        assert isinstance(env, ManiSkillEnv)
        return ManiSkillExpert(env, rng)
    return Expert(env, rng, config.hold)
