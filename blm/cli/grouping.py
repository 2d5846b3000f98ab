"""Command that groups the questions of a corpus by their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from blm.cli.command import CliCommand, OutFolder
from blm.types import require_numbers

console = Console()


@dataclass(frozen=True, kw_only=True)
class GroupCorpus(CliCommand):
    """Merge the questions about the same pictures into one conversation each.

    Each question is still trained as if it were asked alone, but the pictures are read once. Rows
    whose turns follow each other stay as they are.

    Example: blm corpus group OUT corpora/sharerobot
    """

    out: OutFolder
    """Corpus folder to write; it must not exist. Media are hard-linked."""
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Corpus folder."""
    turns: int = 20
    """Maximum number of questions in a conversation.
    A conversation longer than --limits.max-length loses its last turns in training."""
    workers: int = 0
    """Number of worker processes that scan the corpus; 0: only the main process."""

    def __post_init__(self) -> None:
        require_numbers(self, turns=(1, 10**6), workers=(0, 1024))

    def run(self, command_line: Sequence[str]) -> None:
        from blm.corpora.grouping import group_corpus

        done = group_corpus(self.source, self.out, turns=self.turns, workers=self.workers)
        console.print(
            f"{done.rows:,} conversations -> {done.conversations:,}, pictures {done.pictures:,} -> "
            f"{done.shared_pictures:,} ({done.factor:.1f} times fewer), {done.alone:,} conversations cannot "
            f"share: {self.out}",
            soft_wrap=True,
            highlight=False,
        )
