"""How `blm` ends when it is interrupted, or when nobody reads its output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from blm.cli import CLOSED_PIPE, INTERRUPTED, _was_interrupted

QUIET_START = "import sys; from blm.cli import main; main(sys.argv[1:])"
START = """
import sys
from blm.cli import main

class FirstImport:
    \"\"\"Says when `main` imports for the first time: from there on it handles interrupts.\"\"\"

    def find_spec(self, name, path=None, target=None):
        sys.meta_path.remove(self)
        print("started", flush=True)

sys.meta_path.insert(0, FirstImport())
main(sys.argv[1:])
"""


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("arguments", [["demo", "--help"], ["eval", "physical", "--help"]])
def test_an_interrupt_while_libraries_are_imported_is_one_line(arguments: list[str], seconds: float) -> None:
    command = [sys.executable, "-c", START, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0:  # it was quicker
        assert errors == ""
    else:
        assert process.returncode == INTERRUPTED
        assert errors.startswith("interrupted") and errors.count("\n") == 1


def test_an_interrupt_that_a_library_hides_is_found() -> None:
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ImportError("numpy failed to import") from None
    except ImportError as error:
        assert _was_interrupted(error)
    assert not _was_interrupted(ImportError("of its own"))


def test_the_entry_point_imports_almost_nothing() -> None:
    code = "import sys; before = {*sys.modules}; import blm.cli; print(*{*sys.modules} - before)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert {*found.stdout.split()} <= {"blm", "blm.cli"}


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["serve", "--help"], ["collect", "--help"], ["corpus", "convert"], ["no-such-command"]],
)
@pytest.mark.parametrize("stream", ["stdout", "both"])
def test_a_closed_pipe_ends_a_command_quietly(arguments: list[str], stream: str) -> None:
    """As with `blm COMMAND | head -0`, and with `2>&1` before the pipe."""
    read, write = os.pipe()
    os.close(read)
    errors = write if stream == "both" else subprocess.PIPE
    command = [sys.executable, "-c", QUIET_START, *arguments]
    done = subprocess.run(command, stdout=write, stderr=errors, timeout=60)
    os.close(write)
    if arguments == ["no-such-command"] and stream == "stdout":
        assert done.returncode == 2 and b"unknown command" in done.stderr
    else:
        assert done.returncode == CLOSED_PIPE
        assert not done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"]])
def test_without_standard_output_a_command_still_ends_well(arguments: list[str]) -> None:
    command = [sys.executable, "-c", QUIET_START, *arguments]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
