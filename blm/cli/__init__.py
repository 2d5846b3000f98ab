"""The command line: the table of commands, and the entry point.

This file imports almost nothing, so that `blm --help` is fast and Ctrl-C prints one line even while
libraries are being imported. The module of a command is imported when the command is called; tyro
then builds its flags from the fields of its class. tyro's own subcommands would need the classes of
all commands at once, and some of these import torch, so the table holds their names instead.

Exit statuses: 0 success; 1 a check found a fault (`doctor`, `corpus validate`, `collect --verify`);
2 wrong usage or an error that the user can correct, in one line; 130 interrupted by Ctrl-C; 141 the
reader of the output closed the pipe, as in `blm --help | head -1`.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # `typing` alone would take longer to import than this file
if TYPE_CHECKING:
    from collections.abc import Sequence

INTERRUPTED = 130
"""128 + SIGINT: the exit status of a program that Ctrl-C ends, by the shell's convention."""
CLOSED_PIPE = 141
"""128 + SIGPIPE: the exit status of a program that writes to a closed pipe."""


class Command:
    """One command in the table.

    `summary` is its line in `blm --help`. `target` is MODULE:CLASS below `blm.cli`, a subclass of
    `blm.cli.command.CliCommand`. `stage` is the stage of a run folder that --run or --recipe runs
    in place of the command; empty if there is none.
    """

    def __init__(self, summary: str, target: str, stage: str = "") -> None:
        self.summary = summary
        self.target = target
        self.stage = stage


COMMANDS: dict[str, Command] = {
    "demo": Command("run the whole loop at small scale and write a report", "runs:Demo"),
    "collect": Command(
        "record demonstrations as a LeRobotDataset v3.0, or verify them (--verify)",
        "collection:Collect",
        stage="collect",
    ),
    "corpus build": Command(
        "generate questions about scenes and episodes", "corpus:BuildCorpus", stage="corpus"
    ),
    "corpus convert": Command("convert a published corpus to messages JSONL", "conversion:ConvertCorpus"),
    "corpus curate": Command(
        "remove faulty, duplicate and leaked conversations, and balance answers", "corpus:CurateCorpora"
    ),
    "corpus group": Command(
        "merge questions about the same pictures, which then share them", "grouping:GroupCorpus"
    ),
    "corpus list": Command(
        "list public corpora: where to get them, how to place them, which are present",
        "public_corpora:ListCorpora",
    ),
    "corpus replay": Command("generate general dialogues with the base model itself", "corpus:ReplayCorpus"),
    "corpus report": Command("count question kinds, and answers that need no image", "corpus:ReportCorpus"),
    "corpus validate": Command("check a whole corpus before training", "corpus:ValidateCorpus"),
    "corpus sharerobot": Command(
        "split ShareRobot by episode into evaluation and training", "sharerobot:SplitShareRobot"
    ),
    "train stage1": Command("fine-tune a backbone on corpora", "training:TrainStage1", stage="stage1"),
    "train stage2": Command(
        "train bridge and policy on the frozen backbone", "training:TrainStage2", stage="stage2"
    ),
    "train baseline": Command(
        "train a Diffusion Policy on the same demonstrations", "training:TrainBaseline"
    ),
    "eval digital": Command(
        "evaluate a model on a question benchmark", "digital:EvaluateDigital", stage="digital"
    ),
    "eval retention": Command(
        "measure how much language ability a fine-tuned backbone has kept", "retention:EvaluateRetention"
    ),
    "eval table": Command("show digital results next to the published ones", "digital:ShowTable"),
    "eval physical": Command(
        "evaluate a policy in closed loop on held-out scenes", "physical:EvaluatePhysical", stage="physical"
    ),
    "study": Command("run an ablation: variants of Stage II with equal budgets and scenes", "runs:Study"),
    "memory": Command("estimate the memory and disk space that a recipe needs", "runs:Memory"),
    "compare": Command("compute the paired difference between two results", "physical:Compare"),
    "report": Command("write one HTML page from a run folder", "runs:Report"),
    "serve": Command("serve chat and actions from one checkpoint", "serve:Serve"),
    "chat": Command("ask a model a question about images", "serve:AskModel"),
    "export vllm": Command(
        "export a checkpoint's backbone as a folder that vLLM serves", "export:ExportVllm"
    ),
    "export compact": Command(
        "export a fine-tuned backbone as changes to its base model", "export:ExportCompact"
    ),
    "export lerobot": Command(
        "export a dataset with its card, for LeRobot and model hubs", "export:ExportDataset"
    ),
    "export checkpoint": Command("export a checkpoint with its card", "export:ExportCheckpoint"),
    "export onnx": Command("export a policy as ONNX graphs that run without torch", "export:ExportOnnx"),
    "export openvino": Command(
        "export a policy as OpenVINO graphs that run without torch", "export:ExportOpenVino"
    ),
    "view": Command("write an episode as a video, contact sheet or Rerun recording", "view:View"),
    "data delete": Command("write a LeRobot dataset without some of its episodes", "data:DeleteEpisodes"),
    "data split": Command("split a LeRobot dataset by episodes into two", "data:SplitDataset"),
    "data merge": Command("join LeRobot datasets of one robot", "data:MergeDatasets"),
    "data reindex": Command("write a LeRobot dataset with episodes from 0 on", "data:ReindexDataset"),
    "data stats": Command("compute the statistics of a LeRobot dataset", "data:ComputeStatistics"),
    "doctor": Command("check this machine, and find faults in datasets and checkpoints", "doctor:Doctor"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `blm`. The exit statuses are listed at the top of this file."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as in `blm COMMAND >&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 (stays open to the end)
    try:
        try:
            _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _end_at_closed_pipe()
    except SystemExit as ended:  # rich turns a closed pipe into status 1
        if isinstance(ended.__context__, BrokenPipeError):
            _end_at_closed_pipe()
        raise


def _run(arguments: list[str]) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # shows our progress bar only
    try:
        from blm.cli.interrupt import exit_on_interrupt

        with exit_on_interrupt("interrupted before the command started"):
            from blm.cli.lookup import find_command, print_error
            from blm.errors import BlmError
        try:
            name, rest = find_command(arguments)
            with exit_on_interrupt("interrupted before the command started"):
                from blm.cli.command import parse_command

                command = parse_command(name, rest)
            command.run(["blm", name, *rest])
        except BlmError as error:
            print_error(error)
            raise SystemExit(2) from None
    except BaseException as error:
        if not _was_interrupted(error):
            raise
        print("interrupted; run the same command again to continue", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _was_interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C caused an error; imports may turn KeyboardInterrupt into others."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _end_at_closed_pipe() -> None:
    """Exit with CLOSED_PIPE, and discard the output that Python still flushes at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
    raise SystemExit(CLOSED_PIPE) from None
