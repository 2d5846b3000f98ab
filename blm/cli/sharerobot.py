"""Command that holds out part of ShareRobot's planning questions for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from blm.cli.command import CliCommand
from blm.evaluation.digital.benchmarks.sharerobot_split import (
    HELD,
    TRAINING,
    SplitConfig,
    read_training,
    split_sharerobot,
)

console = Console()


@dataclass(frozen=True, kw_only=True)
class SplitShareRobot(CliCommand):
    """Hold out whole episodes of ShareRobot for `blm eval digital --benchmark sharerobot`.

    Writes the lists of held-out episodes and training episodes into the dataset's folder.

    Example: blm corpus sharerobot ShareRobot
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder of the published dataset, with planning/train/*.json."""
    config: Annotated[SplitConfig, tyro.conf.arg(name="")] = field(default_factory=SplitConfig)
    """What to hold out."""
    trained: tuple[Path, ...] = ()
    """JSON lists of the episodes that a model was trained on; none of them is held out."""

    def run(self, command_line: Sequence[str]) -> None:
        trained = {name for file in self.trained for name in read_training(file)}
        summary = split_sharerobot(self.folder, self.config, exclude=trained)
        each = f"{summary.episodes} x {summary.templates}"
        console.print(
            f"{summary.questions} questions held out ({each} x 10 kinds, seed {self.config.seed}): "
            f"{self.folder / HELD}\n{summary.training_episodes} episodes left for training, none of them "
            f"held out: {self.folder / TRAINING}",
            soft_wrap=True,
        )
