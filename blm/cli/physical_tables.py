"""Tables of the commands for the simulated suite: success rates, robustness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from blm.evaluation.physical.perturbed import ConditionSummary, PerturbedSummary
    from blm.evaluation.physical.result import PhysicalResult
    from blm.evaluation.statistics import Difference, Rate

console = Console()
WIDTH = 130
"""Minimum width of the tables [characters]."""


def print_wide(table: Table) -> None:
    """Print a table at its full width: a narrow terminal wraps its lines but cuts no cell."""
    Console(width=max(console.width, WIDTH)).print(table)


def print_result(result: PhysicalResult) -> None:
    """Print success rates of every robot and task with intervals, reasons of failures, and robustness."""
    table = Table(box=None)
    for heading in ("robot", "task", "n", "once", "95 %", "at end", "strict", "at limit", "failures"):
        table.add_column(heading, justify="left" if heading in ("robot", "task", "failures") else "right")
    summary = result.summary
    rows = [(cell.robot, cell.task, cell.summary) for cell in summary.cells]
    rows += [("all", wording.replace("_", " "), part) for wording, part in summary.phrasings.items()]
    for robot, task, part in [*rows, ("all", "all", summary.overall)]:
        once, strict, limit = part.success_once, part.success_strict, part.success_at_limit
        failures = ", ".join(f"{reason} {n}" for reason, n in part.reasons.items() if n)
        table.add_row(
            robot,
            task,
            str(part.n),
            f"{once.rate:.0%}",
            f"{once.low:.1%} to {once.high:.1%}",
            f"{part.success_at_end.rate:.0%}",
            "-" if strict is None else f"{strict.rate:.0%}",
            "-" if limit is None else f"{limit.rate:.0%}",
            failures or "-",
        )
    print_wide(table)
    if summary.perturbed is not None:
        _print_perturbed(summary.perturbed)
    minutes, spent = result.seconds / 60, result.execution
    parts = ""
    if spent is not None:
        parts = (
            f"policy {spent.seconds_policy:.0f} s, physics {spent.seconds_physics:.0f} s, "
            f"rendering {spent.seconds_rendering:.0f} s"
        )
    console.print(f"{minutes:.1f} min in all; summed over workers: {parts}", soft_wrap=True)


def _print_perturbed(summary: PerturbedSummary) -> None:
    """Print success by axis and level against the twins, then dynamics and controls."""
    if summary.axes:
        table = _table("axis", *(f"level {one.condition.level}" for one in summary.axes[0].levels), "all")
        for axis in summary.axes:
            rates = [level.summary.success_once for level in axis.levels]
            table.add_row(axis.axis, *map(_interval, (*rates, axis.success)), _points(axis.drop))
        if summary.mean_of_axes is not None and summary.drop is not None:
            empty = [""] * len(summary.axes[0].levels)
            table.add_row("mean", *empty, _interval(summary.mean_of_axes), _points(summary.drop))
        print_wide(table)
        if (worst := summary.worst_axis) is not None:
            console.print(f"worst axis: {worst.axis}, {_interval(worst.success)}", soft_wrap=True)
    for heading, part in (("dynamics", summary.dynamics), ("control", summary.controls)):
        if part:
            _print_conditions(heading, part)
    if summary.chance is not None and summary.wrong_object is not None:
        console.print(
            f"chance (words ignored): {summary.chance:.0%}; wrong object in the plain episodes: "
            f"{_interval(summary.wrong_object)}",
            soft_wrap=True,
        )


def _print_conditions(heading: str, part: Sequence[ConditionSummary]) -> None:
    table = _table(heading, "n", "once")
    for one in part:
        rate = one.summary.success_once
        table.add_row(one.condition.name, str(rate.n), _interval(rate), _points(one.drop))
    print_wide(table)


def _table(first: str, *headings: str) -> Table:
    table = Table(box=None)
    table.add_column(first)
    for heading in (*headings, "minus twins"):
        table.add_column(heading, justify="right")
    return table


def _interval(rate: Rate) -> str:
    return f"{rate.rate:.0%} ({100 * rate.low:.0f}-{100 * rate.high:.0f})"


def _points(gap: Difference) -> str:
    return f"{100 * gap.difference:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
