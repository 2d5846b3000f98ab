"""Collects demonstrations: every robot and task, many seeds, several processes, through any number of kills.

One attempt is one work unit, keyed robot/task/seed. A successful one stages its episode before it returns,
a failed one returns its reason. A robot and task that lack episodes get the next seeds.
The same configuration gives the same vectors, bit for bit, on the same machine and versions.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blm.data.episodes import finalize_dataset, stage_episode
from blm.demos.expert import HOLD_STEPS, Expert
from blm.demos.planner import PlanError
from blm.demos.primitives import DECOMPOSITIONS
from blm.engine import Result, Unit, run_units
from blm.robots import ROBOTS
from blm.tasks import Env
from blm.types import BlmError, Episode, lookup

NOISY = {"approach": 1.0, "lift": 1.0, "move": 1.0, "push": 0.3}
"""Primitives that are executed with noise, and their share of it; near contact there is none."""
SETTLE = 6
"""The noise fades out over the last steps of each motion, or it would never arrive."""
NOISE_MEMORY = 0.9
"""Correlation of the execution noise from step to step."""
PULSE = 8
"""Steps for which a disturbance works the gripper the wrong way."""


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """What to collect."""

    robots: tuple[str, ...] = ("panda", "xarm6", "xarm7", "widowxai")
    tasks: tuple[str, ...] = ("push_cube", "pick_cube")
    episodes: int = 50
    """Successful episodes to keep for each robot and task."""
    first_seed: int = 10_000
    """Scenes are those of this seed and the ones after it."""
    cameras: tuple[str, ...] = ("base", "side", "wrist")
    image_size: int = 112
    """Side of the pictures [px], even."""
    noise: tuple[float, ...] = (0.0, 0.01, 0.02)
    """Deviations of the noise on executed, not on recorded, joint targets [rad]; one is drawn an episode."""
    disturbed: float = 0.15
    """Share of episodes in which the gripper works the wrong way for a moment: misses, drops, recoveries."""
    random_starts: float = 0.3
    """Share of episodes that start away from home."""
    distractors: int = 0
    workers: int = 2
    """Processes; 0 runs in this one."""

    def __post_init__(self) -> None:
        for robot in self.robots:
            lookup("robot", robot, ROBOTS)
        for task in self.tasks:
            lookup("task with an expert", task, DECOMPOSITIONS)
        if self.episodes < 1 or not self.noise or min(self.noise) < 0 or self.image_size % 2:
            raise BlmError(
                "collecting needs episodes >= 1, at least one noise level >= 0 and an even image_size; got "
                f"{self.episodes}, {self.noise}, {self.image_size}"
            )

    @property
    def greatest_attempts(self) -> int:
        """Seeds tried for one cell before giving up."""
        return 3 * self.episodes + 10


@dataclass(frozen=True, kw_only=True)
class CollectSummary:
    """What a collection did; `summary.json` in its folder."""

    robots: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """robot -> task -> {"kept", "rejected": {reason: count}, "frames"}."""
    seconds: float
    """Wall-clock time of the run that finished the collection."""
    versions: Mapping[str, str]
    seeds: tuple[int, int]
    """First and last seed tried."""
    config: Mapping[str, Any]


def collect(config: CollectConfig, out: Path) -> CollectSummary:
    """Collect into `out/<robot>/`, one LeRobotDataset v3.0 each, and write `out/summary.json`.

    Called again after a kill, it goes on; called again when finished, it returns the summary. Raises BlmError
    when `out` holds a collection of another configuration, or a cell fails too often.
    """
    began = time.monotonic()
    wanted = json.loads(json.dumps({k: v for k, v in asdict(config).items() if k != "workers"}))
    finished = _claim(out, wanted)
    if finished is not None:
        return finished
    staging = out / ".staging"
    results = _attempt_all(config, out, staging)
    versions = {name: version(name) for name in ("blm", "mujoco", "mink", "toppra", "numpy")}
    cells: dict[str, dict[str, Any]] = {}
    for robot in config.robots:
        rows = {key: result for key, result in results.items() if key.startswith(f"{robot}/")}
        cells[robot] = {task: _count(task, rows) for task in config.tasks}
        finalize_dataset(
            [staging / key for key, result in rows.items() if result["kept"]],
            out / robot,
            space=ROBOTS[robot].action_space,
            cameras=config.cameras,
            image_size=config.image_size,
            provenance={"versions": versions, "collect": wanted},
        )
    seeds = [int(key.split("/")[2]) for key in results]
    summary = CollectSummary(
        robots=cells,
        seconds=round(time.monotonic() - began, 1),
        versions=versions,
        seeds=(min(seeds), max(seeds)),
        config=wanted,
    )
    _write_json(out / "summary.json", asdict(summary))
    _clean(out)
    return summary


def _claim(out: Path, wanted: dict[str, Any]) -> CollectSummary | None:
    """Make `out` ours; return the summary of a finished collection. Raises BlmError if it is another's."""
    out.mkdir(parents=True, exist_ok=True)
    claim = out / "collect.json"
    if not claim.exists():
        _write_json(claim, wanted)
    have = json.loads(claim.read_text())
    if have != wanted:
        rows = [
            f"  {k}: {have.get(k)!r} there, {v!r} asked for" for k, v in wanted.items() if have.get(k) != v
        ]
        raise BlmError(
            f"'{out}' holds a collection with another configuration; use another folder or delete it:\n"
            + "\n".join(rows)
        )
    if not (out / "summary.json").exists():
        return None
    _clean(out)
    stored = json.loads((out / "summary.json").read_text())
    return CollectSummary(**stored | {"seeds": tuple(stored["seeds"])})


def _clean(out: Path) -> None:
    """Remove what only an unfinished collection needs."""
    shutil.rmtree(out / ".staging", ignore_errors=True)
    (out / "journal.jsonl").unlink(missing_ok=True)


def _attempt_all(config: CollectConfig, out: Path, staging: Path) -> dict[str, Result]:
    """Run attempts until every cell has its episodes; return key -> result of all of them."""
    tried = dict.fromkeys(((r, t) for r in config.robots for t in config.tasks), config.episodes)
    while True:
        units = [
            Unit(f"{robot}/{task}/{seed}", (config, robot, task, seed, staging))
            for (robot, task), count in tried.items()
            for seed in range(config.first_seed, config.first_seed + count)
        ]
        journal = out / "journal.jsonl"
        results = run_units(_attempt, units, journal=journal, workers=config.workers, title="collecting")
        short = False
        for (robot, task), count in tried.items():
            rows = {key: result for key, result in results.items() if key.startswith(f"{robot}/{task}/")}
            missing = config.episodes - sum(result["kept"] for result in rows.values())
            if missing and count >= config.greatest_attempts:
                raise BlmError(
                    f"{robot} {task}: {count} attempts gave {config.episodes - missing} of {config.episodes} "
                    f"episodes; rejected: {_count(task, rows)['rejected']}; lower noise or disturbed"
                )
            tried[robot, task] = min(count + missing, config.greatest_attempts)
            short = short or missing > 0
        if not short:
            return results


def _count(task: str, rows: Mapping[str, Result]) -> dict[str, Any]:
    mine = [result for key, result in rows.items() if key.split("/")[1] == task]
    return {
        "kept": sum(result["kept"] for result in mine),
        "rejected": dict(sorted(Counter(r["reason"] for r in mine if not r["kept"]).items())),
        "frames": sum(result.get("frames", 0) for result in mine),
    }


def _attempt(payload: tuple[CollectConfig, str, str, int, Path]) -> Result:
    """One work unit: make, check and stage one episode."""
    config, robot, task, seed, staging = payload
    expert = _expert(robot, task, config.cameras, config.image_size, config.distractors)
    episode, reason = demonstrate(expert, seed, config)
    if episode is None:
        return {"kept": False, "reason": reason}
    stage_episode(staging, f"{robot}/{task}/{seed}", episode)
    return {"kept": True, "frames": len(episode)}


@cache
def _expert(robot: str, task: str, cameras: tuple[str, ...], image_size: int, distractors: int) -> Expert:
    """One environment for each cell and process: making one costs as much as several episodes."""
    env = Env(
        robot,
        task,
        cameras=cameras,
        image_size=image_size,
        terminate_on_success=False,
        distractors=distractors,
    )
    return Expert(env, np.random.default_rng(0))


def demonstrate(expert: Expert, seed: int, config: CollectConfig) -> tuple[Episode | None, str]:
    """Let the expert solve scene `seed`; return the episode, or None and the reason of its rejection.

    Noise and disturbances act on what is executed, while the recorded action is the expert's own: the data
    show how to come back, not how to go astray (as in DART, Laskey et al., CoRL 2017).
    """
    env, rng = expert.env, np.random.default_rng((seed, 1))
    sigma = float(rng.choice(config.noise))
    pulse = int(rng.integers(5, 40)) if rng.random() < config.disturbed else -PULSE
    start = "random" if rng.random() < config.random_starts else "home"
    observation, _ = env.reset(seed=seed, options={"arm": start})
    expert.reset(rng)
    noise = np.zeros(env.contract_space.dim - 1)
    seen: list[dict[str, Any]] = []
    actions: list[NDArray[np.float32]] = []
    names: list[str] = []
    success: list[bool] = []
    while not expert.done and len(actions) < env._max_episode_steps:
        try:
            action, name = expert.act()
        except PlanError as error:
            return None, error.reason
        noise = NOISE_MEMORY * noise + math.sqrt(1 - NOISE_MEMORY**2) * sigma * rng.normal(size=len(noise))
        executed = action.copy()
        executed[:-1] += noise * NOISY.get(name, 0.0) * min(1.0, expert.remaining / SETTLE)
        if pulse <= len(actions) < pulse + PULSE:
            executed[-1] = 1 - executed[-1]
        seen.append(observation)
        actions.append(action)
        names.append(name)
        observation, _, _, _, info = env.step(executed)
        success.append(info["success"])
    if not expert.done or not all(success[-HOLD_STEPS:]):
        return None, _reason(names, expert.drops)
    last_failure = max((t for t, ok in enumerate(success) if not ok), default=-1)
    images = {camera: np.stack([o["pixels"][camera] for o in seen]) for camera in env.cameras}
    return Episode(
        robot=env.robot.name,
        task=env.task,
        seed=seed,
        instruction=env.task_description,
        states=np.stack([o["agent_pos"] for o in seen]),
        actions=np.stack(actions),
        images=images,
        primitives=tuple(names),
        metrics={
            "success_step": last_failure + 1,
            "noise": sigma,
            "disturbed": float(pulse >= 0),
            "random_start": float(start == "random"),
            "drops": expert.drops,
        },
    ), ""


def _reason(names: list[str], drops: int) -> str:
    """Why an episode ran out of time."""
    if drops:
        return "dropped"
    return (
        "missed_grasp" if names[-1] in ("approach", "descend", "grasp") and "grasp" in names else "no_success"
    )


def replay(env: Env, episode: Episode) -> bool:
    """Whether the recorded actions give, bit for bit, the recorded states, and the same success.

    `env` must be of the same robot and task. Raises BlmError for an episode with noise or a disturbance: what
    was executed is not what was recorded.
    """
    if episode.metrics["noise"] or episode.metrics["disturbed"]:
        raise BlmError(
            f"episode of seed {episode.seed} was executed with noise; only clean ones can be replayed"
        )
    start = "random" if episode.metrics["random_start"] else "home"
    observation, info = env.reset(seed=episode.seed, options={"arm": start})
    for state, action in zip(episode.states, episode.actions, strict=True):
        if not np.array_equal(observation["agent_pos"], state):
            return False
        observation, _, _, _, info = env.step(action)
    return bool(info["success"]) == episode.success


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)
