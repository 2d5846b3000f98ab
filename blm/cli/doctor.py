"""Command that checks this machine, datasets and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from blm.cli.command import CliCommand
from blm.types import BlmError

if TYPE_CHECKING:
    from blm.datasets.mapping import DataMapping


@dataclass(frozen=True, kw_only=True)
class Doctor(CliCommand):
    """Check this machine and the given datasets and checkpoints, and print a fix for each fault.

    The exit status is 1 if there is a fault.

    With --suggest, also write a mapping for each dataset of another program: what its columns mean,
    for you to check, and for training to read it through.

    Example: blm doctor downloads/so101 --suggest
    """

    paths: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="[FOLDER ...]", help_behavior_hint="(optional)"),
    ] = ()
    """Folders of datasets, collections or checkpoints."""
    mapping: Path | None = None
    """Mapping through which the datasets are read and checked."""
    suggest: bool = False
    """Write NAME.mapping.json for each dataset NAME, and check the dataset through it."""
    out: Path | None = None
    """File of the suggested mapping; by default in the working folder, named after the dataset."""
    fit: Literal["letterbox", "crop"] = "letterbox"
    """How a suggested mapping turns pictures that are no squares into squares."""
    image_size: int | None = None
    """Side of these squares [px]; by default 224, or that of the pictures if it is smaller."""

    def __post_init__(self) -> None:
        if self.suggest and (not self.paths or self.mapping is not None):
            raise BlmError("--suggest needs a dataset, and no --mapping")
        if self.out is not None and (not self.suggest or len(self.paths) != 1):
            raise BlmError("--out is the file of one suggested mapping: give --suggest and one dataset")

    def run(self, command_line: Sequence[str]) -> None:
        from blm.app.doctor import examine_machine, examine_path
        from blm.datasets.mapping import read_mapping

        given = None if self.mapping is None else read_mapping(self.mapping)
        checks = [*examine_machine()]
        for path in self.paths:
            checks += examine_path(path, self._suggested(path) if self.suggest else given)
        table = Table(box=None, show_header=False)
        for overflow in ("ellipsis", "ellipsis", "fold"):
            table.add_column(overflow=overflow)
        for check in checks:
            table.add_row("[red]FAULT[/red]" if check.fix else "[green]ok[/green]", check.name, check.found)
            if check.fix:
                table.add_row("", "fix", check.fix)
        Console().print(table)
        raise SystemExit(any(check.fix for check in checks))

    def _suggested(self, path: Path) -> DataMapping:
        """Write the mapping of a dataset, print what to check in it, and return it."""
        from blm.datasets.mapping import write_mapping
        from blm.datasets.suggestion import suggest_mapping

        found = suggest_mapping(path, self.fit, self.image_size)
        file = self.out or Path(f"{path.resolve().name}.mapping.json")
        if file.exists():
            raise BlmError(f"'{file}' exists; move it away, or name another file with --out")
        write_mapping(file, found.mapping)
        console = Console()
        console.print(f"wrote {file}; read it, correct it, and give it with --mappings", soft_wrap=True)
        for note in found.notes:
            console.print(f"  check: {note}", soft_wrap=True, markup=False, highlight=False)
        return found.mapping
