"""Commands for run folders: the whole loop, one of its stages, ablations, the report.

`--recipe NAME` selects the defaults of all other flags, and `--run FOLDER` the run folder. Dotted
flags such as `--stage2.loop.steps 500` override single fields of the recipe.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import getdoc
from pathlib import Path
from typing import Annotated, Self

import tyro
from rich.console import Console

from blm.app.pipeline import run_stages
from blm.app.recipe import Recipe
from blm.app.recipes import RECIPES
from blm.app.stages import STAGES, write_report
from blm.app.studies import STUDIES, run_study
from blm.cli import COMMANDS
from blm.cli.command import CliCommand, RunSelection, split_flags
from blm.training.loop.distributed import Processes
from blm.types import lookup

console = Console()
DEFAULT_RECIPE = "demo"
RECIPE_HELP = f"""The flag --recipe NAME selects the recipe: {", ".join(RECIPES)}.

The default is {DEFAULT_RECIPE}.

The flag --run FOLDER names the run folder. The default is runs/NAME.

Each of the following flags overrides a field of the recipe."""


@dataclass(frozen=True, kw_only=True)
class RecipeCommand(CliCommand):
    """A command whose flags are the fields of a recipe."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    folder: tyro.conf.Suppress[Path] = Path()
    """The run folder, from --run."""

    @classmethod
    def parse(cls, name: str, arguments: Sequence[str]) -> Self:
        selection, rest = split_flags(RunSelection, name, arguments)
        base = cls(recipe=lookup("recipe", selection.recipe or DEFAULT_RECIPE, RECIPES)())
        description = f"{getdoc(cls)}\n\n{RECIPE_HELP}"
        parsed = tyro.cli(cls, default=base, args=rest, prog=f"blm {name}", description=description)
        return replace(parsed, folder=selection.run or Path("runs") / parsed.recipe.name)


class StageCommand(RecipeCommand):
    """Run one stage of the loop in a run folder, unless it has finished with the same settings."""

    def run(self, command_line: Sequence[str]) -> None:
        run_stages(STAGES, [COMMANDS[command_line[1]].stage], self.recipe, self.folder)
        Processes.join(self.recipe.device).leave()


class Demo(RecipeCommand):
    """Run the whole loop: demonstrations, scene questions, Stage I, Stage II, evaluation.

    Run the same command again to resume an interrupted run.

    Example: blm demo --recipe ci --run runs/ci
    """

    def run(self, command_line: Sequence[str]) -> None:
        run_stages(STAGES, list(STAGES), self.recipe, self.folder)
        processes = Processes.join(self.recipe.device)
        if processes.first:
            self._report(command_line)
        processes.leave()

    def _report(self, command_line: Sequence[str]) -> None:
        report = write_report(self.folder, shlex.join(command_line))
        console.print(f"\nreport: [bold]{report}[/bold] (open it in a browser)", soft_wrap=True)
        console.print(
            f"""Next steps:
  .venv/bin/blm serve {self.folder}/stage2/checkpoint     serve chat and actions on port 8000
  .venv/bin/blm chat {self.folder}/stage2/checkpoint --image PICTURE.png --image WRIST.png --question "..."
  .venv/bin/blm view {self.folder}/episodes/panda         write a demonstration as a video
  .venv/bin/blm collect --help                       show the flags""",
            highlight=False,
            soft_wrap=True,
        )


@dataclass(frozen=True, kw_only=True)
class Study(RecipeCommand):
    """Run an ablation: train and evaluate variants of Stage II on the data and backbone of a run.

    Example: blm study future --run runs/nano
    """

    study: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="STUDY")] = None
    """Name of the study; `blm study --help` lists them."""
    variants: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[VARIANT ...]", help_behavior_hint="")
    ] = ()
    """Variants to compare with the study's first variant; by default all."""

    @classmethod
    def parse(cls, name: str, arguments: Sequence[str]) -> Self:
        if list(arguments[:1]) in ([], ["-h"], ["--help"]):
            _print_studies()
            raise SystemExit(0 if arguments else 2)
        parsed = super().parse(name, arguments)
        if parsed.study is None:
            _print_studies()
            raise SystemExit(2)
        lookup("study", parsed.study, STUDIES)
        return parsed

    def run(self, command_line: Sequence[str]) -> None:
        assert self.study is not None  # `parse` requires it
        report = run_study(self.study, self.recipe, self.folder, self.variants)
        console.print(report.read_text(), markup=False, soft_wrap=True)
        console.print(f"report: {report}", soft_wrap=True)


def _print_studies() -> None:
    console.print(
        "blm study STUDY [VARIANT ...] --run FOLDER [flags of `blm demo`]\n\nStudies:", markup=False
    )
    for name, variants in STUDIES.items():
        names = ", ".join(f"'{variant.name}'" for variant in variants)
        console.print(f"  {name}: {names}", soft_wrap=True, highlight=False)


@dataclass(frozen=True, kw_only=True)
class Memory(RecipeCommand):
    """Estimate the memory and disk space of each stage of a recipe, without loading weights.

    Example: blm memory --recipe qwen2_5_vl_7b --device cuda
    """

    processes: int = 1
    """Number of processes that train together, each with its own GPU."""
    shard: bool = False
    """Shard weights and moments over the processes (FSDP2)."""

    def run(self, command_line: Sequence[str]) -> None:
        from blm.app.memory.estimate import estimate_memory
        from blm.app.memory.table import describe

        estimate = estimate_memory(self.recipe, processes=self.processes, shard=self.shard)
        text = describe(estimate, self.recipe.device)
        console.print(text, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Report(CliCommand):
    """Write FOLDER/report.html from the results that a run folder holds.

    Example: blm report runs/demo
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Run folder, as `blm demo --run` writes it."""

    def run(self, command_line: Sequence[str]) -> None:
        report = write_report(self.folder, f"blm report {self.folder}")
        console.print(f"report: {report}", soft_wrap=True)
