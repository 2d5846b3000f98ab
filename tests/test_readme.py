"""Every command and every path that the README and the pages of docs/ show exists and parses."""

from __future__ import annotations

import re
import shlex
from itertools import takewhile

import pytest

from blm.app.studies import STUDIES
from blm.cli import digital, find_command, parse_recipe
from blm.cli.physical import parse_collect, parse_evaluate
from blm.cli.training import parse_baseline, parse_stage1, parse_stage2
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
        name, _, rest = find_command(words[1:])
        if name == "collect" and "--run" not in rest:
            parse_collect(name, rest)
        elif name == "eval physical" and "--run" not in rest:
            parse_evaluate(name, rest)
        elif name == "eval digital" and "--run" not in rest:
            digital.parse_evaluate(name, rest)
        elif name == "train stage1" and "--run" not in rest:
            parse_stage1(name, rest)
        elif name == "train stage2" and "--run" not in rest:
            parse_stage2(name, rest)
        elif name == "train baseline":
            parse_baseline(name, rest)
        elif name == "study":
            study, *variants = takewhile(lambda word: not word.startswith("-"), rest)
            assert {*variants} <= {variant.name for variant in STUDIES[study]}
            parse_recipe(name, rest[1 + len(variants) :])
        elif name in ("demo", "memory") or "--run" in rest:
            parse_recipe(name, rest)
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
