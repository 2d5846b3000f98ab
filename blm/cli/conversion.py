"""The command that converts published corpora."""

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
    from blm.corpora.converters.report import Tally

console = Console()


@dataclass(frozen=True, kw_only=True)
class ConvertCorpus(CliCommand):
    """Convert a published corpus to messages JSONL; media are linked or copied into OUT.

    Without arguments, the command lists the converters.

    Example: blm corpus convert llava llava.json OUT --media images
    """

    name: Annotated[
        tyro.conf.Positional[str], tyro.conf.arg(metavar="[CONVERTER]", help_behavior_hint="")
    ] = ""
    """Name of the converter."""
    source: Annotated[
        tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[SOURCE]", help_behavior_hint="")
    ] = None
    """File or folder to convert; for easy_vqa, the name of a split."""
    out: Annotated[
        tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[OUT]", help_behavior_hint="")
    ] = None
    """Corpus folder to write; it must not exist."""
    frames: int = 8
    """Number of frames to take from each video."""
    media: Path | None = None
    """Folder that media references are relative to; by default the folders around the rows are tried."""
    source_name: str = ""
    """Source name to write into each conversation; by default the converter's name."""
    untagged: Literal["refuse", "first"] = "refuse"
    """How to treat rows that have media but no media tag.
    With `refuse`, such a row is invalid; with `first`, the media come before the first question."""
    independent: bool = False
    """No question of a row refers to another one, so that each may be trained as if it were alone.
    By default, a row is one dialogue and is trained as a whole."""
    cameras: tuple[str, ...] = ()
    """Cameras of a robot dataset to take images from; by default its first camera."""
    skip_bad: bool = False
    """Skip and print rows that cannot be converted; by default, the first one stops the command."""

    def run(self, command_line: Sequence[str]) -> None:
        from blm.corpora import ConverterConfig, convert
        from blm.corpora.format.faults import summarise

        if not self.name:
            _print_converters()
            return
        if self.source is None or self.out is None:
            raise BlmError("name the source and the folder to write: blm corpus convert CONVERTER SOURCE OUT")
        settings = ConverterConfig(
            frames=self.frames,
            media=self.media,
            source=self.source_name,
            untagged=self.untagged,
            independent=self.independent,
            cameras=self.cameras,
        )
        done = convert(self.name, self.source, self.out, settings, skip_bad=self.skip_bad)
        console.print(f"{done.written} of {done.read} rows: {self.out}", soft_wrap=True)
        _print_tally(done.tally)
        if done.skipped:
            console.print(f"skipped:\n{summarise(done.skipped)}", highlight=False, markup=False)


def _print_tally(tally: Tally) -> None:
    """Print where the fields of the rows went."""
    table = Table(box=None)
    for heading in ("field", "went to", "count"):
        table.add_column(heading, overflow="fold")
    for name, counts in sorted(tally.fields.items()):
        for use, count in counts.items():
            table.add_row(name, use, f"{count:,}")
    for note, count in tally.notes.items():
        table.add_row("", note, f"{count:,}")
    table.add_row("", "answers that are learnt", f"{tally.trained:,}")
    table.add_row("", "answers without loss", f"{tally.context:,}")
    console.print(table)


def _print_converters() -> None:
    from blm.corpora import CONVERTERS

    table = Table(box=None)
    for heading in ("name", "reads", "from"):
        table.add_column(heading, overflow="fold")
    for name, converter in CONVERTERS.items():
        table.add_row(name, converter.reads, converter.origin)
    console.print(table)
