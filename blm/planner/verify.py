"""Verify a collection: replay its recorded actions from their seeds and compare states bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from blm.datasets.lerobot import open_dataset
from blm.io import write_json
from blm.jobs import Result, WorkUnit, run_units
from blm.planner.collect import CollectConfig, make_env
from blm.planner.collection_summary import SUMMARY, CollectionSummary
from blm.planner.demonstration import replay
from blm.tasks.randomization import DomainRandomization
from blm.tasks.suite import suite_version
from blm.types import BlmError, ContractError

CHUNK = 20
"""Number of episodes in one work unit."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The replay of a collection."""

    episodes: int
    same: int
    """Episodes that replayed bit for bit."""
    differing: Mapping[str, str]
    """robot/task/seed -> the first difference."""


def verify(out: Path, *, workers: int = 2, engine: Literal["local", "ray"] = "local") -> Verification:
    """Replay every episode of a collection; write and return `out/verified.json`.

    Raises BlmError if `out` is not a finished collection, and ContractError if the versions of
    suite or simulator differ from the recorded ones.
    """
    if not (out / SUMMARY).is_file():
        raise BlmError(f"'{out}' holds no finished collection (no summary.json); collect it, or finish it")
    summary = CollectionSummary.read(out)
    config = read_config(summary.config)
    if config.actions == "eef":
        raise BlmError(
            f"'{out}' has poses of the tool, from which inverse kinematics does not get the same joint "
            "targets bit for bit; verify a collection of joint targets with the same seeds"
        )
    _require_same_versions(summary, config)
    units = []
    for robot in config.robots:
        count = open_dataset(out / robot).num_episodes
        units += [
            WorkUnit(f"{robot}/{i}", (out, config, robot, i, min(i + CHUNK, count)))
            for i in range(0, count, CHUNK)
        ]
    journal = out / ".verify.jsonl"
    results = run_units(
        _replay_some, units, journal=journal, workers=workers, engine=engine, title="replaying"
    )
    differing = {key: what for result in results.values() for key, what in result["differing"].items()}
    episodes = sum(result["episodes"] for result in results.values())
    outcome = Verification(episodes=episodes, same=episodes - len(differing), differing=differing)
    write_json(out / "verified.json", asdict(outcome))
    journal.unlink()
    return outcome


def read_config(stored: Mapping[str, Any]) -> CollectConfig:
    """Return the configuration that is stored with a collection.

    Raises BlmError for a collection of an earlier version with `appearance`, which cannot be drawn again.
    """
    if any(stored.get("appearance", {}).values()):
        raise BlmError(
            f"recorded with appearance {stored['appearance']}, which `randomization` has replaced: its "
            "pictures cannot be made again; verify it with the program version that collected it"
        )
    known = {field.name for field in fields(CollectConfig)}
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in known
    }
    values["randomization"] = DomainRandomization(**stored.get("randomization", {}))
    return CollectConfig(**values)


def _require_same_versions(summary: CollectionSummary, config: CollectConfig) -> None:
    simulator = config.package
    recorded = {simulator: summary.versions[simulator], "suite": summary.suite}
    here = {simulator: version(simulator), "suite": suite_version(config.robots, config.tasks)}
    if recorded != here:
        raise ContractError(
            f"recorded with {recorded}, this is {here}: only the same world replays bit for bit; "
            f"install {simulator}=={recorded[simulator]} and the program version of the collection"
        )


def _replay_some(payload: tuple[Path, CollectConfig, str, int, int]) -> Result:
    """Run one work unit: replay episodes first..last of one robot."""
    out, config, robot, first, last = payload
    dataset = open_dataset(out / robot)
    differing: dict[str, str] = {}
    env = None
    for i in range(first, last):
        episode = dataset.episode(i, cameras=())
        if env is None or env.task != episode.task:
            env = make_env(config, robot, episode.task, cameras=())
        if what := replay(env, episode):
            differing[f"{robot}/{episode.task}/{episode.seed}"] = what
    return {"episodes": last - first, "differing": differing}
