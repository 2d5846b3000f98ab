"""Every command and every path that the README and the pages of docs/ show exists and parses."""

from __future__ import annotations

import re
import shlex

import pytest

from blm.app.studies import STUDIES
from blm.cli.command import parse_command
from blm.cli.lookup import find_command
from blm.cli.runs import Study
from tests.support.documents import COMMANDS, README, ROOT

PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_readme_shows_commands():
    assert any("make demo" in line for line in COMMANDS) and any("make test" in line for line in COMMANDS)
    assert PYTHON


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist(line):
    words = shlex.split(line, comments=True)
    if words[0].endswith("accelerate") and words[1] == "launch":
        words = words[words.index(".venv/bin/blm") :]
    if words[0] == "make":
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[0].endswith("blm"):
        name, rest = find_command(words[1:])
        command = parse_command(name, rest)
        if isinstance(command, Study):
            assert command.study is not None
            assert {*command.variants} <= {variant.name for variant in STUDIES[command.study]}
    elif words[0].endswith("python"):
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in ("git", "cd"), f"no test covers: {line}"


@pytest.mark.parametrize("block", PYTHON)
def test_python_blocks_compile_and_import(block):
    compile(block, "README.md", "exec")
    for line in block.splitlines():
        if line.startswith(("import ", "from ")):
            exec(line, {})


def test_named_paths_exist():
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", README) + re.findall(r'<img src="([^"]+)"', README):
        assert (ROOT / path).exists(), path
