"""The command that records demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Self

import tyro
from rich.table import Table

from blm.cli.command import CliCommand, split_flags
from blm.cli.physical_tables import console, print_wide
from blm.planner import CollectConfig
from blm.planner.collection_summary import CollectionSummary
from blm.types import BlmError


@dataclass(frozen=True, kw_only=True)
class CollectMode:
    """Flags of `blm collect` that are not fields of the config. They are parsed first."""

    verify: bool = False
    correct: bool = False
    policy: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Collect(CliCommand):
    """Record demonstrations by the planning expert into OUT/<robot>, one dataset per robot.

    The datasets have LeRobot's format v3.0. Run the same command again to resume a collection.

    With --verify, nothing is recorded: every episode of OUT is replayed and must match bit for bit.

    With --policy CHECKPOINT --correct, a policy controls the first steps of every episode.

    The dataset then holds the expert's corrections in the states that the policy reaches.

    Example: blm collect data --robots panda --tasks push_cube --episodes 10
    """

    out: Annotated[
        tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="OUT", help_behavior_hint="(required)")
    ] = None
    """Folder to write."""
    config: Annotated[CollectConfig, tyro.conf.arg(name="")] = field(default_factory=CollectConfig)
    mode: tyro.conf.Suppress[CollectMode] = field(default_factory=CollectMode)

    @classmethod
    def parse(cls, name: str, arguments: Sequence[str]) -> Self:
        mode, rest = split_flags(CollectMode, name, arguments)
        if (mode.policy is not None) != mode.correct:
            raise BlmError("--policy CHECKPOINT and --correct belong together: give both or none")
        return replace(super().parse(name, rest), mode=mode)

    def run(self, command_line: Sequence[str]) -> None:
        from blm.app.policies import load_checkpoint
        from blm.planner import collect
        from blm.planner.verify import verify

        if self.out is None:
            raise BlmError("name the folder to write: blm collect OUT [flags]; --help shows the flags")
        if self.mode.verify:
            outcome = verify(self.out, workers=self.config.workers, engine=self.config.engine)
            console.print(f"{outcome.same} of {outcome.episodes} episodes replayed bit for bit")
            for key, what in outcome.differing.items():
                console.print(f"[red]differs:[/red] {key}: {what}")
            raise SystemExit(bool(outcome.differing))
        pilot = partial(load_checkpoint, self.mode.policy) if self.mode.policy else None
        print_summary(collect(self.config, self.out, pilot))


def print_summary(summary: CollectionSummary) -> None:
    """Print the attempts of a collection by robot and task, and the time of each part."""
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
    for robot, cells in summary.robots.items():
        for task, cell in cells.items():
            rejected = dict(cell.rejected)
            far = rejected.pop("unreachable", 0)
            share = f"{cell.kept / max(cell.attempts - far, 1):.0%}"
            reasons = ", ".join(f"{reason} {count}" for reason, count in rejected.items())
            numbers = (cell.kept, cell.attempts, far, share, cell.frames, reasons or "-")
            table.add_row(robot, task, *map(str, numbers))
            kept += cell.kept
            frames += cell.frames
    print_wide(table)
    total = sum(summary.seconds_in.values())
    parts = ", ".join(f"{part} {s / total:.0%}" for part, s in summary.seconds_in.items())
    minutes = summary.seconds / 60
    rate = f"{kept} episodes, {frames} frames in {minutes:.1f} min: {kept / minutes:.0f} episodes/min"
    console.print(f"{rate}; time: {parts}", soft_wrap=True)
