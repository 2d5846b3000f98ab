"""Command that lists the public corpora for Stage I."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from blm.cli.command import CliCommand
from blm.corpora.public import PUBLIC_CORPORA, place, require_sound
from blm.types import BlmError

console = Console()


@dataclass(frozen=True, kw_only=True)
class ListCorpora(CliCommand):
    """List the public corpora that recipes mix into Stage I, and which of them are present.

    The exit status is 1 if one is present but faulty.

    Example: blm corpus list --folder corpora
    """

    folder: Path = Path("corpora")
    """Folder with one corpus folder for each name."""

    def run(self, command_line: Sequence[str]) -> None:
        faulty = 0
        for name, corpus in PUBLIC_CORPORA.items():
            placed, state = place(name, self.folder), "missing"
            if placed.present:
                try:
                    require_sound(placed)
                    state = "present"
                except BlmError as error:
                    state, faulty = f"FAULTY: {error}", faulty + 1
            rows = f"{corpus.rows:,} rows reported" if corpus.rows else "number of rows not known"
            lines = (
                f"{name}: {state} ({placed.folder})",
                f"  {corpus.holds}; {rows}",
                f"  licence: {corpus.licence}",
                f"  {corpus.steps(self.folder)}",
                f"  {corpus.note}" if corpus.note else "",
            )
            text = "\n".join(line for line in lines if line)
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(int(faulty > 0))
