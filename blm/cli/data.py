"""Commands that edit LeRobotDatasets of other programs. Each writes a new folder."""

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
Source = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATASET")]


@dataclass(frozen=True, kw_only=True)
class DeleteEpisodes(CliCommand):
    """Write a dataset without some of its episodes; the others are renumbered.

    Example: blm data delete downloads/so101 so101-good --episodes 3 7
    """

    dataset: Source
    """LeRobotDataset of another program."""
    out: OutFolder
    """Folder to write; it must not exist."""
    episodes: tuple[int, ...]
    """Numbers of the episodes to leave out, from 0."""

    def run(self, command_line: Sequence[str]) -> None:
        from blm.datasets.editing import Selection, episodes_without, select_episodes

        kept = episodes_without(self.dataset, self.episodes)
        select_episodes([Selection(self.dataset, kept)], self.out)
        console.print(f"wrote {len(kept)} episodes to {self.out}", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class SplitDataset(CliCommand):
    """Write OUT/train and OUT/held_out, with the episodes of a dataset drawn at random.

    Example: blm data split downloads/so101 so101-split --held-out 0.1
    """

    dataset: Source
    """LeRobotDataset of another program."""
    out: OutFolder
    """Folder for the two datasets."""
    held_out: float = 0.1
    """Fraction of the episodes that is held out."""
    seed: int = 0
    """Seed of the draw."""

    def __post_init__(self) -> None:
        require_numbers(self, held_out=(1e-6, 0.999999), seed=(0, 2**32 - 1))

    def run(self, command_line: Sequence[str]) -> None:
        from blm.datasets.editing import Selection, episodes_without, select_episodes
        from blm.datasets.mixture import split_episodes

        count = len(episodes_without(self.dataset, ()))
        for name, part in zip(
            ("train", "held_out"), split_episodes(count, self.held_out, self.seed), strict=True
        ):
            select_episodes([Selection(self.dataset, tuple(part.tolist()))], self.out / name)
            console.print(f"wrote {len(part)} episodes to {self.out / name}", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class MergeDatasets(CliCommand):
    """Join datasets of one version, rate and set of features.

    Example: blm data merge both --datasets monday tuesday
    """

    out: OutFolder
    """Folder to write; it must not exist."""
    datasets: tuple[Path, ...]
    """LeRobotDatasets of other programs, in the order of their episodes in the result."""

    def run(self, command_line: Sequence[str]) -> None:
        from blm.datasets.editing import Selection, select_episodes

        select_episodes([Selection(folder) for folder in self.datasets], self.out)
        console.print(f"wrote {self.out}", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class ReindexDataset(CliCommand):
    """Write a dataset with episodes, frames and instructions numbered from 0 on, and new metadata.

    Example: blm data reindex downloads/so101 so101-new
    """

    dataset: Source
    """LeRobotDataset of another program."""
    out: OutFolder
    """Folder to write; it must not exist."""

    def run(self, command_line: Sequence[str]) -> None:
        from blm.datasets.editing import Selection, select_episodes

        select_episodes([Selection(self.dataset)], self.out)
        console.print(f"wrote {self.out}", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class ComputeStatistics(CliCommand):
    """Compute meta/stats.json of a dataset: exact for vectors, from some pictures for cameras.

    Example: blm data stats downloads/so101
    """

    dataset: Source
    """LeRobotDataset of another program; its meta/stats.json is replaced."""

    def run(self, command_line: Sequence[str]) -> None:
        from blm.datasets.editing import write_statistics

        write_statistics(self.dataset)
        console.print(f"wrote {self.dataset / 'meta/stats.json'}", soft_wrap=True)
