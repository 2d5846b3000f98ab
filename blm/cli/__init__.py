"""The command line. Stage commands work on a run folder; `--recipe NAME` and dotted flags set the rest."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console
from rich.table import Table

from blm.cli import corpus, digital, export, physical, retention, sharerobot
from blm.cli import serve as model
from blm.types import BlmError, UnknownNameError, lookup

if TYPE_CHECKING:
    from blm.app.recipes import Recipe

console = Console()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `blm`. Errors that a user can mend end with one line and exit status 2."""
    try:
        try:
            _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # `blm .. | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python ends
        raise SystemExit(128 + 13) from None  # as a program that SIGPIPE ends


def _run(arguments: list[str]) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # one bar at a time: ours
    try:
        name, command, rest = find_command(arguments)
        command.run(name, rest)
    except BlmError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command continues where it stopped")
        raise SystemExit(130) from None


@dataclass(frozen=True)
class Command:
    """One command: what it does, and the function that gets its name and its arguments."""

    summary: str
    run: Callable[[str, list[str]], None]


def find_command(arguments: list[str]) -> tuple[str, Command, list[str]]:
    """Split the arguments into command and rest; commands have one word or two (`train stage1`)."""
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_commands()
        raise SystemExit(0)
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, COMMANDS[name], arguments[words:]
    raise UnknownNameError("command", " ".join(arguments[:2]).split(" -")[0], COMMANDS)


def _print_commands() -> None:
    table = Table(box=None, show_header=False)
    for name, command in COMMANDS.items():
        table.add_row(f"blm {name}", command.summary)
    console.print("Boundless: one embodied model, two spaces. `blm COMMAND --help` shows the flags.\n")
    console.print(table)


# --- stages of a run ----------------------------------------------------------------------------------------


def _stage(*names: str) -> Callable[[str, list[str]], None]:
    def run(command: str, arguments: list[str]) -> None:
        from blm.app.pipeline import run_stages
        from blm.app.stages import STAGES

        recipe, folder = parse_recipe(command, arguments)
        run_stages(STAGES, list(names), recipe, folder)

    return run


def parse_recipe(command: str, arguments: list[str]) -> tuple[Recipe, Path]:
    """Return the recipe with its overrides applied, and the run folder."""
    from blm.app.recipes import RECIPES, Recipe

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="demo")
    first.add_argument("--run", type=Path)
    known, rest = first.parse_known_args(arguments)
    base = lookup("recipe", known.recipe, RECIPES)()
    description = (
        f"--recipe NAME: one of {', '.join(RECIPES)}. --run FOLDER: where everything goes (runs/NAME)."
    )
    recipe = tyro.cli(Recipe, default=base, args=rest, prog=f"blm {command}", description=description)
    return recipe, known.run or Path("runs") / recipe.name


def _demo(command: str, arguments: list[str]) -> None:
    from blm.app.pipeline import run_stages
    from blm.app.stages import STAGES, write_report

    recipe, folder = parse_recipe(command, arguments)
    run_stages(STAGES, list(STAGES), recipe, folder)
    report = write_report(folder, shlex.join(["blm", command, *arguments]))
    console.print(f"\nreport: [bold]{report}[/bold] (open it in a browser)", soft_wrap=True)
    console.print(
        f"""Next:
  .venv/bin/blm serve {folder}/stage2/checkpoint     chat and actions on port 8000
  .venv/bin/blm chat {folder}/stage2/checkpoint --image PICTURE.png --image WRIST.png --question "..."
  .venv/bin/blm view {folder}/episodes/panda         look at a demonstration
  .venv/bin/blm collect --help                       every field of the recipe is a flag""",
        highlight=False,
        soft_wrap=True,
    )


def _study(command: str, arguments: list[str]) -> None:
    from blm.app.studies import STUDIES, run_study

    names = list(takewhile(lambda name: not name.startswith("-"), arguments))
    for name in names[:1]:
        lookup("study", name, STUDIES)
    if not names:
        console.print(
            f"blm study NAME [VARIANT ..] --run FOLDER ..: {', '.join(STUDIES)}; flags as those of `blm demo`"
        )
        raise SystemExit(0 if "--help" in arguments or "-h" in arguments else 2)
    recipe, folder = parse_recipe(command, arguments[len(names) :])
    report = run_study(names[0], recipe, folder, names[1:])
    console.print(report.read_text(), markup=False, soft_wrap=True)
    console.print(f"report: {report}", soft_wrap=True)


def _memory(command: str, arguments: list[str]) -> None:
    from blm.app.memory import describe

    recipe, _ = parse_recipe(command, arguments)
    console.print(describe(recipe), highlight=False, markup=False, soft_wrap=True)


def _report(command: str, arguments: list[str]) -> None:
    from blm.app.stages import write_report

    def report(run: tyro.conf.Positional[Path]) -> None:
        """Write RUN/report.html from whatever the run folder holds.

        Args:
            run: Folder of a run.
        """
        console.print(f"report: {write_report(run, 'blm report ' + str(run))}", soft_wrap=True)

    tyro.cli(report, args=arguments, prog=f"blm {command}")


def _either(stage: str, command: Callable[[str, list[str]], None]) -> Callable[[str, list[str]], None]:
    """With --run or --recipe the stage of a run folder, else the command that needs none."""

    def run(name: str, arguments: list[str]) -> None:
        of_run = any(argument.split("=")[0] in ("--run", "--recipe") for argument in arguments)
        (_stage(stage) if of_run else command)(name, arguments)

    return run


def _train(what: Literal["stage1", "stage2", "baseline"]) -> Callable[[str, list[str]], None]:
    def train(command: str, arguments: list[str]) -> None:
        from blm.cli import training  # its flags are those of the trainers: it loads torch

        getattr(training, what)(command, arguments)

    return train


# --- looking ------------------------------------------------------------------------------------------------


def _view(command: str, arguments: list[str]) -> None:
    def view(
        dataset: tyro.conf.Positional[Path],
        episode: int = 0,
        form: Literal["mp4", "sheet", "rerun", "suite"] = "mp4",
        out: Path | None = None,
    ) -> None:
        """Write one episode as a video, a contact sheet or a Rerun recording; or one picture of a collection.

        Args:
            dataset: Folder of one robot's dataset; for the form suite, of a collection of several robots.
            episode: Number of the episode.
            form: A video, a picture with frames side by side, a recording (needs the extra `viewer`), or the
                first episode of every robot and task in one picture.
            out: File to write; by default in the working folder, named after the episode.
        """
        if form == "suite":
            from blm.app.viewing import collection_sheet

            path = collection_sheet(dataset, out or Path("suite.png"))
        else:
            path = physical.picture_episode(dataset, episode, form, out)
        console.print(f"wrote {path}", soft_wrap=True)

    tyro.cli(view, args=arguments, prog=f"blm {command}")


def _doctor(command: str, arguments: list[str]) -> None:
    def doctor(paths: tyro.conf.Positional[tuple[Path, ...]] = ()) -> None:
        """Check this machine, and any datasets and checkpoints given; exit status 1 if something is wrong.

        Args:
            paths: Folders of datasets or checkpoints.
        """
        from blm.app.doctor import examine_machine, examine_path

        checks = [*examine_machine(), *(check for path in paths for check in examine_path(path))]
        table = Table(box=None, show_header=False)
        for style in (None, None, "fold"):
            table.add_column(overflow=style or "ellipsis")
        for check in checks:
            table.add_row("[red]FAULT[/red]" if check.fix else "[green]ok[/green]", check.name, check.found)
            if check.fix:
                table.add_row("", "fix", check.fix)
        console.print(table)
        raise SystemExit(any(check.fix for check in checks))

    tyro.cli(doctor, args=arguments, prog=f"blm {command}")


COMMANDS: dict[str, Command] = {
    "demo": Command("the whole loop at small scale, ends with a report", _demo),
    "collect": Command(
        "record demonstrations (LeRobotDataset v3.0), or replay them (--verify)",
        _either("collect", physical.collect),
    ),
    "corpus build": Command("make questions about scenes and episodes", _either("corpus", corpus.build)),
    "corpus convert": Command("published corpora -> messages JSONL", corpus.convert),
    "corpus curate": Command("drop faults, doubles and leaks, balance answers; with a report", corpus.curate),
    "corpus replay": Command("general dialogues by the base model itself", corpus.replay),
    "corpus report": Command("kinds of questions, and what needs no picture", corpus.report),
    "corpus validate": Command("check a whole corpus before training", corpus.validate),
    "corpus sharerobot": Command(
        "split ShareRobot by episode: evaluation, training", sharerobot.split_sharerobot
    ),
    "train stage1": Command("fine-tune a backbone on corpora", _either("stage1", _train("stage1"))),
    "train stage2": Command(
        "train bridge and policy on the frozen backbone", _either("stage2", _train("stage2"))
    ),
    "train baseline": Command("train a Diffusion Policy on the same demonstrations", _train("baseline")),
    "eval digital": Command("ask the questions of a benchmark", _either("digital", digital.evaluate)),
    "eval retention": Command("what a tuned backbone kept of its base's language", retention.retention),
    "eval table": Command("digital results beside the published ones", digital.table),
    "eval physical": Command(
        "drive the robots, closed loop, on held-out scenes", _either("physical", physical.evaluate)
    ),
    "study": Command("what an idea buys: variants of Stage II on the same budget and scenes", _study),
    "memory": Command("what a recipe needs in memory and on disk", _memory),
    "compare": Command("the paired difference of two results", physical.compare),
    "report": Command("write one HTML page from a run folder", _report),
    "serve": Command("chat and actions from one checkpoint", model.serve),
    "chat": Command("ask one question about pictures", model.chat),
    "export vllm": Command("a checkpoint's backbone as a folder that vLLM serves", export.vllm),
    "export lerobot": Command("a data set with its card, for LeRobot and hubs", export.copied),
    "export checkpoint": Command("a checkpoint, for others", export.copied),
    "view": Command("an episode as video or contact sheet", _view),
    "doctor": Command("what this machine can run; faults of datasets and checkpoints", _doctor),
}
