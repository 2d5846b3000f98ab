"""Command that checks this machine, datasets and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from blm.cli.command import CliCommand


@dataclass(frozen=True, kw_only=True)
class Doctor(CliCommand):
    """Check this machine and the given datasets and checkpoints, and print a fix for each fault.

    The exit status is 1 if there is a fault.

    Example: blm doctor runs/demo/episodes
    """

    paths: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="[FOLDER ...]", help_behavior_hint="(optional)"),
    ] = ()
    """Folders of datasets, collections or checkpoints."""

    def run(self, command_line: Sequence[str]) -> None:
        from blm.app.doctor import examine_machine, examine_path

        checks = [*examine_machine(), *(check for path in self.paths for check in examine_path(path))]
        table = Table(box=None, show_header=False)
        for overflow in ("ellipsis", "ellipsis", "fold"):
            table.add_column(overflow=overflow)
        for check in checks:
            table.add_row("[red]FAULT[/red]" if check.fix else "[green]ok[/green]", check.name, check.found)
            if check.fix:
                table.add_row("", "fix", check.fix)
        Console().print(table)
        raise SystemExit(any(check.fix for check in checks))
