"""Commands of the physical suite: collect, verify, evaluate any policy, compare results, look at episodes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from blm.types import BlmError, require_numbers

if TYPE_CHECKING:
    from blm.evaluation.physical.result import PhysicalResult
    from blm.planner import CollectConfig

console = Console()
WIDTH = 130
"""Characters that the tables need."""
COLLECT_HELP = """Record demonstrations of the expert into OUT/<robot>, one LeRobotDataset v3.0 a robot.
The same command again continues what was interrupted. With --verify: record nothing, replay every episode of
OUT and compare states bit for bit. With --policy CHECKPOINT --correct: that policy drives the first steps of
every episode, and the expert's corrections are recorded on the states that it visits."""


def parse_collect(command: str, arguments: list[str]) -> tuple[argparse.Namespace, CollectConfig]:
    """Return (out, verify, correct, policy) and what to collect. Raises BlmError for what does not fit."""
    from blm.planner import CollectConfig

    out = Path(arguments[0]) if arguments and not arguments[0].startswith("-") else None
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--verify", action="store_true")
    first.add_argument("--correct", action="store_true")
    first.add_argument("--policy", type=Path)
    own, rest = first.parse_known_args(arguments[0 if out is None else 1 :])
    usage = f"blm {command} OUT [--verify] [--policy CHECKPOINT --correct]"
    config = tyro.cli(CollectConfig, default=CollectConfig(), args=rest, prog=usage, description=COLLECT_HELP)
    if out is None:
        raise BlmError("name the folder to write first: blm collect OUT [flags]; --help shows the flags")
    own.out = out
    if (own.policy is not None) != own.correct:
        raise BlmError("--policy CHECKPOINT and --correct belong together: give both or none")
    return own, config


def collect(command: str, arguments: list[str]) -> None:
    """`blm collect OUT`: record demonstrations, replay them, or record corrections of a policy."""
    from blm.planner import collect as run_collect
    from blm.planner.verify import verify

    own, config = parse_collect(command, arguments)
    if own.verify:
        outcome = verify(own.out, workers=config.workers, engine=config.engine)
        console.print(f"{outcome['same']} of {outcome['episodes']} episodes replayed bit for bit")
        for key, what in outcome["differing"].items():
            console.print(f"[red]differs:[/red] {key}: {what}")
        raise SystemExit(bool(outcome["differing"]))
    from blm.app.policies import load_checkpoint

    pilot = partial(load_checkpoint, own.policy) if own.policy else None
    print_summary(run_collect(config, own.out, pilot))


def _print_wide(table: Table) -> None:
    """A terminal narrower than the table wraps its lines; its cells are not cut."""
    Console(width=max(console.width, WIDTH)).print(table)


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print what a collection kept and rejected, cell by cell, and where the time went."""
    table = Table(box=None)
    for heading in (
        "robot",
        "task",
        "kept",
        "attempts",
        "unreachable",
        "success",
        "frames",
        "other rejections",
    ):
        table.add_column(heading, justify="left" if heading in ("robot", "task") else "right")
    kept = frames = 0
    for robot, cells in summary["robots"].items():
        for task, cell in cells.items():
            rejected = dict(cell["rejected"])
            far = rejected.pop("unreachable", 0)
            share = f"{cell['kept'] / max(cell['attempts'] - far, 1):.0%}"
            reasons = ", ".join(f"{reason} {count}" for reason, count in rejected.items())
            numbers = (cell["kept"], cell["attempts"], far, share, cell["frames"], reasons or "-")
            table.add_row(robot, task, *map(str, numbers))
            kept, frames = kept + cell["kept"], frames + cell["frames"]
    _print_wide(table)
    total = sum(summary["seconds_in"].values())
    parts = ", ".join(f"{part} {s / total:.0%}" for part, s in summary["seconds_in"].items())
    minutes = summary["seconds"] / 60
    rate = f"{kept} episodes, {frames} frames in {minutes:.1f} min: {kept / minutes:.0f} episodes/min"
    console.print(f"{rate}; time: {parts}", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Drive the robots with one policy; write OUT/result.json, videos and OUT/report.html."""

    model: str
    """A checkpoint folder, expert, zero, random, replay:DATASET, or ws://HOST:PORT of an OpenPI server."""
    out: Path
    """Folder to write; the same command again continues what was interrupted."""
    protocol: str = "suite24"
    """Named protocol. With any of the next four changed it is another one, without a name."""
    robots: tuple[str, ...] = ()
    """Only these."""
    tasks: tuple[str, ...] = ()
    """Only these."""
    episodes: int | None = None
    """Per robot and task."""
    latency: Literal["none", "measured"] | float = "none"
    """none: the world waits for the policy. measured: it moves on while the policy thinks (live mode). A
    number: the policy takes so many seconds."""
    workers: int = 2
    """Processes; 0 runs in this one."""
    simulator: Literal["mujoco", "maniskill"] = "mujoco"
    """maniskill: the Panda's tasks as ManiSkill has them; needs its own environment (docs/maniskill.md)."""
    engine: Literal["local", "ray"] = "local"
    """Where episodes run: on this machine, or on a Ray cluster."""
    device: str = "cpu"
    """Torch device of a checkpoint. On another than the CPU one model answers all workers, in batches."""
    max_batch: int = 64
    """Observations that one such call may hold; with 1 the model gives the same bits every time."""
    cameras: tuple[str, ...] = ("base", "wrist")
    """Pictures for policies that have no contract of their own."""
    image_size: int = 112
    """Their side [px]."""
    horizon: int = 16
    """Actions in a chunk of such a policy."""
    execute: int = 8
    """How many of them are carried out before it is asked again."""
    continued: bool = False
    """Let a checkpoint go on from its own last chunk (real-time chunking): smoother, and slower."""
    videos: int = 1
    """Episodes of each cell that are filmed."""
    api_key: str | None = None
    """For an OpenPI server that wants one."""
    server_name: str = ""
    """Name and version of the model behind a server that sends no contract. Its address does not tell which
    model it is: without a name an interrupted evaluation begins anew, in another folder."""

    def __post_init__(self) -> None:
        from blm.jobs import MAX_WORKERS
        from blm.seeds import EVALUATION_SEEDS

        require_numbers(self, episodes=(1, len(EVALUATION_SEEDS)), videos=(0, 1_000_000))
        require_numbers(self, workers=(0, MAX_WORKERS), max_batch=(1, 100_000), image_size=(16, 4096))
        if self.latency not in ("none", "measured"):
            require_numbers(self, latency=(0, 3600))
        require_numbers(self, horizon=(1, 100_000), execute=(1, self.horizon))


def parse_evaluate(command: str, arguments: list[str]) -> Evaluate:
    return tyro.cli(Evaluate, args=arguments, prog=f"blm {command}")


def evaluate(command: str, arguments: list[str]) -> None:
    """`blm eval physical --model X`: drive the robots with any policy, under a named protocol."""
    from blm.app.policies import continuing, contract_of, find_policy, load_replay
    from blm.evaluation import PhysicalProtocol, evaluate_physical
    from blm.evaluation.report import ReportData, build_report

    chosen = parse_evaluate(command, arguments)
    if chosen.model.startswith("replay:"):
        make, protocol = load_replay(Path(chosen.model.removeprefix("replay:")))
    else:
        make = find_policy(
            chosen.model,
            cameras=chosen.cameras,
            image_size=chosen.image_size,
            horizon=chosen.horizon,
            execute=chosen.execute,
            api_key=chosen.api_key,
            device=chosen.device,
            server_name=chosen.server_name,
        )
        make = partial(continuing, make) if chosen.continued else make
        wanted = {name: getattr(chosen, name) for name in ("robots", "tasks", "episodes")}
        changes: Any = {name: value for name, value in wanted.items() if value}
        if chosen.simulator == "maniskill":
            changes |= {"robots": ("panda",), "simulator": f"maniskill {version('mani_skill')}"}
        protocol = PhysicalProtocol.named(
            chosen.protocol, contract_of(make), latency=chosen.latency, **changes
        )
    result = evaluate_physical(
        make,
        protocol,
        chosen.out,
        workers=chosen.workers,
        videos_per_cell=chosen.videos,
        engine=chosen.engine,
        max_batch=chosen.max_batch,
    )
    print_result(result)
    file = chosen.out / "result.json"
    console.print(f"result: {file}", soft_wrap=True)
    if protocol.purpose == "evaluation":
        report, title = chosen.out / "report.html", f"{chosen.model}: {protocol.name or 'own protocol'}"
        build_report(ReportData(title=title, physical={chosen.model: file}), report)
        console.print(f"report: {report}", soft_wrap=True)


def print_result(result: PhysicalResult) -> None:
    """Print success rates of every cell with intervals, and the reasons of the failures."""
    table = Table(box=None)
    for heading in ("robot", "task", "n", "once", "95 %", "at end", "at limit", "failures"):
        table.add_column(heading, justify="left" if heading in ("robot", "task", "failures") else "right")
    summary = result.summary
    rows = [(cell.robot, cell.task, cell.summary) for cell in summary.cells]
    rows += [("all", wording.replace("_", " "), part) for wording, part in summary.phrasings.items()]
    for robot, task, part in [*rows, ("all", "all", summary.overall)]:
        once, limit = part.success_once, part.success_at_limit
        failures = ", ".join(f"{reason} {n}" for reason, n in part.reasons.items() if n)
        table.add_row(
            robot,
            task,
            str(part.n),
            f"{once.rate:.0%}",
            f"{once.low:.1%} to {once.high:.1%}",
            f"{part.success_at_end.rate:.0%}",
            "-" if limit is None else f"{limit.rate:.0%}",
            failures or "-",
        )
    _print_wide(table)
    minutes, spent = result.seconds / 60, result.execution
    parts = ""
    if spent is not None:
        parts = (
            f"policy {spent.seconds_policy:.0f} s, physics {spent.seconds_physics:.0f} s, "
            f"rendering {spent.seconds_rendering:.0f} s"
        )
    console.print(f"{minutes:.1f} min in all; summed over workers: {parts}", soft_wrap=True)


def compare(command: str, arguments: list[str]) -> None:
    """`blm compare A B`: the paired difference of two results on the same scenes or questions."""
    from blm.evaluation import format_comparison, load_result

    def run(a: tyro.conf.Positional[Path], b: tyro.conf.Positional[Path]) -> None:
        """Compare two results of one protocol, item by item; refuses results of unlike protocols.

        Args:
            a: Folder of an evaluation, or its result.json.
            b: The other one.
        """
        print(format_comparison(load_result(a), load_result(b), names=(str(a), str(b))))

    tyro.cli(run, args=arguments, prog=f"blm {command}")


def picture_episode(
    dataset: Path, episode: int, form: Literal["mp4", "sheet", "rerun"], out: Path | None
) -> Path:
    """Write one episode of a dataset; return the file."""
    from blm.app.viewing import contact_sheet, write_mp4, write_rerun
    from blm.datasets.lerobot import open_dataset

    data = open_dataset(dataset)
    if not 0 <= episode < data.num_episodes:
        raise BlmError(f"episode {episode} is not in '{dataset}': valid are 0..{data.num_episodes - 1}")
    suffix = {"mp4": "mp4", "sheet": "png", "rerun": "rrd"}[form]
    path = out or Path(f"{data.space.robot}-{episode:05d}.{suffix}")
    seen = data.episode(episode)
    if form == "sheet":
        return contact_sheet([seen], path)
    if form == "mp4":
        return write_mp4(seen, path)
    return write_rerun(seen, path, names=data.space.names)
