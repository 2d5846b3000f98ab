"""Find a command in the table, and print the table or an error.

Needs rich only, so that `blm --help` does not wait for tyro and NumPy.
"""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from blm.cli import COMMANDS
from blm.errors import UnknownNameError


def find_command(arguments: list[str]) -> tuple[str, list[str]]:
    """Split arguments into the name of a command, of one or two words, and the rest.

    Without a command, print the table of commands and exit. Raises UnknownNameError for an unknown
    command.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_commands()
        raise SystemExit(0)
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, arguments[words:]
    raise UnknownNameError("command", " ".join(arguments[:2]).split(" -")[0], COMMANDS)


def print_error(error: Exception) -> None:
    """Print an error in one paragraph on stderr."""
    message = escape(str(error))  # brackets in an error are not markup
    Console(stderr=True).print(f"[red]error:[/red] {message}", highlight=False, soft_wrap=True)


def _print_commands() -> None:
    table = Table(box=None, show_header=False)
    for name, command in COMMANDS.items():
        table.add_row(f"blm {name}", command.summary)
    console = Console()
    console.print(
        "Boundless: one embodied model that answers questions and controls robot arms.\n"
        "`blm COMMAND --help` shows the flags of a command.\n"
    )
    console.print(table)
