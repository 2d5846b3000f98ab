"""`blm corpus sharerobot FOLDER`: hold out part of ShareRobot's planning questions for evaluation."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import tyro
from rich.console import Console

from blm.evaluation.digital.benchmarks.sharerobot_split import HELD, TRAINING, SplitConfig, read_training
from blm.evaluation.digital.benchmarks.sharerobot_split import split_sharerobot as split

console = Console()


def split_sharerobot(command: str, arguments: list[str]) -> None:
    """Draw the held-out episodes and write both lists into the dataset's folder."""

    def run(
        folder: tyro.conf.Positional[Path],
        config: tyro.conf.OmitArgPrefixes[SplitConfig] = SplitConfig(),  # noqa: B008 (frozen)
        trained: tuple[Path, ...] = (),
    ) -> None:
        """Hold out whole episodes of ShareRobot; `blm eval digital --benchmark sharerobot` then asks them.

        Args:
            folder: The dataset as published: it has planning/train/*.json.
            config: What to hold out.
            trained: Lists of episodes that a model has been trained on (JSON); none of them is drawn.
        """
        used = {name for file in trained for name in read_training(file)}
        numbers = split(folder, config, exclude=used)
        each = " x ".join(str(numbers[field.name]) for field in fields(config)[:2])
        console.print(
            f"{numbers['questions']} questions held out ({each} x 10 kinds, seed {config.seed}): "
            f"{folder / HELD}\n{numbers['training_episodes']} episodes left to train on, none of them held "
            f"out: {folder / TRAINING}",
            soft_wrap=True,
        )

    tyro.cli(run, args=arguments, prog=f"blm {command}")
