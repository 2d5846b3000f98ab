"""Collects demonstrations: every robot and task, many seeds, several processes, through any number of kills.

One attempt is one work unit, keyed robot/task/seed: it stages its episode, or returns why it failed, and the
next seed is tried. The same configuration gives the same vectors, bit for bit, on one machine.
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
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from blm.data.episodes import finalize_dataset, stage_episode
from blm.data.writing import write_json
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


def collect(config: CollectConfig, out: Path) -> dict[str, Any]:
    """Collect into `out/<robot>/`, one LeRobotDataset v3.0 each; return, and write, `out/summary.json`.

    The summary has "robots" (robot -> task -> kept, rejected by reason, frames), "seconds" of the run that
    finished, "versions", "seeds" (first and last tried) and "config". Called again after a kill, it goes on;
    called again when finished, it returns the summary. Raises BlmError when `out` holds a collection of
    another configuration, or a cell fails too often.
    """
    began = time.monotonic()
    wanted = json.loads(json.dumps({k: v for k, v in asdict(config).items() if k != "workers"}))
    _claim(out, wanted)
    summary_file, staging, journal = out / "summary.json", out / ".staging", out / "journal.jsonl"
    if not summary_file.exists():
        results = _attempt_all(config, journal, staging)
        versions = {name: version(name) for name in ("blm", "mujoco", "mink", "toppra", "numpy")}
        for robot in config.robots:
            kept = [k for k, result in results.items() if k.startswith(f"{robot}/") and result["kept"]]
            finalize_dataset(
                [staging / key for key in kept],
                out / robot,
                space=ROBOTS[robot].action_space,
                cameras=config.cameras,
                image_size=config.image_size,
                provenance={"versions": versions, "collect": wanted},
            )
        seeds = [int(key.split("/")[2]) for key in results]
        summary = {
            "robots": {r: {t: _count(results, r, t) for t in config.tasks} for r in config.robots},
            "seconds": round(time.monotonic() - began, 1),
            "versions": versions,
            "seeds": [min(seeds), max(seeds)],
            "config": wanted,
        }
        write_json(summary_file, summary)
    shutil.rmtree(staging, ignore_errors=True)
    journal.unlink(missing_ok=True)
    return dict(json.loads(summary_file.read_text()))


def _claim(out: Path, wanted: dict[str, Any]) -> None:
    """Make `out` ours. Raises BlmError if it is another collection's."""
    out.mkdir(parents=True, exist_ok=True)
    claim = out / "collect.json"
    if not claim.exists():
        write_json(claim, wanted)
    have = json.loads(claim.read_text())
    rows = [f"  {k}: {have.get(k)!r} there, {v!r} asked for" for k, v in wanted.items() if have.get(k) != v]
    if rows:
        raise BlmError(
            f"'{out}' holds a collection with another configuration; use another folder or delete it:\n"
            + "\n".join(rows)
        )


def _attempt_all(config: CollectConfig, journal: Path, staging: Path) -> dict[str, Result]:
    """Run attempts until every cell has its episodes; return key -> result of all of them."""
    limit = 3 * config.episodes + 10
    tried = dict.fromkeys(product(config.robots, config.tasks), config.episodes)
    while True:
        units = [
            Unit(f"{robot}/{task}/{seed}", (config, robot, task, seed, staging))
            for (robot, task), count in tried.items()
            for seed in range(config.first_seed, config.first_seed + count)
        ]
        results = run_units(_attempt, units, journal=journal, workers=config.workers, title="collecting")
        counts = {cell: _count(results, *cell) for cell in tried}
        missing = {cell: config.episodes - count["kept"] for cell, count in counts.items()}
        if not any(missing.values()):
            return results
        for (robot, task), lacking in missing.items():
            if lacking and tried[robot, task] >= limit:
                raise BlmError(
                    f"{robot} {task}: {limit} attempts gave {config.episodes - lacking} of {config.episodes} "
                    f"episodes; rejected: {counts[robot, task]['rejected']}; lower noise or disturbed"
                )
            tried[robot, task] = min(tried[robot, task] + lacking, limit)


def _count(results: Mapping[str, Result], robot: str, task: str) -> dict[str, Any]:
    """What became of the attempts at one robot and task."""
    mine = [result for key, result in results.items() if key.startswith(f"{robot}/{task}/")]
    return {
        "kept": sum(result["kept"] for result in mine),
        "rejected": dict(sorted(Counter(r["reason"] for r in mine if not r["kept"]).items())),
        "frames": sum(result.get("frames", 0) for result in mine),
    }


def _attempt(payload: tuple[CollectConfig, str, str, int, Path]) -> Result:
    """One work unit: make, check and stage one episode."""
    config, robot, task, seed, staging = payload
    episode, reason = demonstrate(_expert(config, robot, task), seed, config)
    if episode is None:
        return {"kept": False, "reason": reason}
    stage_episode(staging, f"{robot}/{task}/{seed}", episode)
    return {"kept": True, "frames": len(episode)}


@cache
def _expert(config: CollectConfig, robot: str, task: str) -> Expert:
    """One environment for each cell and process: making one costs as much as several episodes."""
    env = Env(
        robot,
        task,
        cameras=config.cameras,
        image_size=config.image_size,
        terminate_on_success=False,
        distractors=config.distractors,
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
    steps: list[tuple[dict[str, Any], Any, str, bool]] = []
    while not expert.done and len(steps) < env._max_episode_steps:
        try:
            action, name = expert.act()
        except PlanError as error:
            return None, error.reason
        noise = NOISE_MEMORY * noise + math.sqrt(1 - NOISE_MEMORY**2) * sigma * rng.normal(size=len(noise))
        executed = action.copy()
        executed[:-1] += noise * NOISY.get(name, 0.0) * min(1.0, expert.remaining / SETTLE)
        if pulse <= len(steps) < pulse + PULSE:
            executed[-1] = 1 - executed[-1]
        following, _, _, _, info = env.step(executed)
        steps.append((observation, action, name, info["success"]))
        observation = following
    seen, actions, names, success = zip(*steps, strict=True)
    if not expert.done or not all(success[-HOLD_STEPS:]):
        missed = names[-1] in ("approach", "descend", "grasp") and "grasp" in names
        return None, "dropped" if expert.drops else "missed_grasp" if missed else "no_success"
    return Episode(
        robot=env.robot.name,
        task=env.task,
        seed=seed,
        instruction=env.task_description,
        states=np.stack([o["agent_pos"] for o in seen]),
        actions=np.stack(actions),
        images={camera: np.stack([o["pixels"][camera] for o in seen]) for camera in env.cameras},
        primitives=names,
        metrics={
            "success_step": 1 + max((t for t, ok in enumerate(success) if not ok), default=-1),
            "noise": sigma,
            "disturbed": float(pulse >= 0),
            "random_start": float(start == "random"),
            "drops": expert.drops,
        },
    ), ""


def replay(env: Env, episode: Episode) -> bool:
    """Whether the recorded actions give, bit for bit, the recorded states, and the same success.

    Raises BlmError for an episode with noise or a disturbance: what was executed is not what was recorded.
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
