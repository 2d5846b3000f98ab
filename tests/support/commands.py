"""Run a command of `blm` in this process; errors stay exceptions."""

from __future__ import annotations

from collections.abc import Sequence

from blm.cli.command import parse_command


def run_command(name: str, arguments: Sequence[str]) -> None:
    """Parse and run `blm NAME ARGUMENTS`. Raises BlmError where `blm` would end with status 2."""
    parse_command(name, arguments).run(["blm", name, *arguments])
