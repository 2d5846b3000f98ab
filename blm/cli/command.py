"""Parse and run a command. A command is a dataclass whose fields are its flags."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Self, TypeVar

import tyro

from blm.cli import COMMANDS

T = TypeVar("T")
OutFolder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
"""Positional argument: the folder that a command writes."""


@dataclass(frozen=True, kw_only=True)
class CliCommand(ABC):
    """Base class of all commands: its docstring is the help text, and its fields are the flags.

    tyro keeps the line breaks of a field's docstring, so each line of it should be a whole
    sentence. In the docstring of a class, a line that does not begin with a letter starts a new
    line of help.
    """

    @classmethod
    def parse(cls, name: str, arguments: Sequence[str]) -> Self:
        """Return the command with these arguments; tyro prints help or usage errors, and exits."""
        return tyro.cli(cls, args=list(arguments), prog=f"blm {name}")

    @abstractmethod
    def run(self, command_line: Sequence[str]) -> None:
        """Run the command. `command_line` is recorded in some of the files that it writes."""


@dataclass(frozen=True, kw_only=True)
class RunSelection:
    """Flags that select recipe and run folder; parsed first, because they set other defaults."""

    recipe: str | None = None
    run: Path | None = None


def parse_command(name: str, arguments: Sequence[str]) -> CliCommand:
    """Return the command, ready to run; with --run or --recipe, its stage of a run folder.

    Imports the module of the command. Raises BlmError for invalid values.
    """
    command = COMMANDS[name]
    target = command.target
    if command.stage:
        selection, _ = split_flags(RunSelection, name, arguments)
        if selection.recipe is not None or selection.run is not None:
            target = "runs:StageCommand"
    module, _, class_name = target.partition(":")
    kind: type[CliCommand] = getattr(import_module(f"blm.cli.{module}"), class_name)
    return kind.parse(name, arguments)


def split_flags(flags: type[T], name: str, arguments: Sequence[str]) -> tuple[T, list[str]]:
    """Parse only the flags of one class; return it, and the remaining arguments."""
    return tyro.cli(flags, args=list(arguments), prog=f"blm {name}", return_unknown_args=True, add_help=False)
