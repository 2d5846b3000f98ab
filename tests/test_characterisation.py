"""What a redesign must not change: flags and defaults, exit statuses, replies, frames, files on disk.

Recorded in characterisation.json beside this file. After a change that is meant, record it again and read the
difference: `python tests/test_characterisation.py [RUN]`, where RUN is a finished run of the `ci` recipe.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

RECORD = Path(__file__).with_suffix("").with_name("characterisation.json")
ONE_COLUMN = {"COLUMNS": "80"}
FLAG = re.compile(
    r"^  (?P<names>(?:-\w, )?--?[\w.-]+(?:, --[\w.-]+)*)(?: (?P<value>\S.*?))?(?:  +(?P<rest>.*))?$"
)
CALLS = {
    "": 0,
    "--help": 0,
    "no-such-command": 2,
    "eval": 2,
    "eval physical": 2,
    "eval physical --model nothing --out OUT": 2,
    "eval physical --model zero --out OUT --robots hal": 2,
    "eval digital --benchmark nothing --data OUT --model nano --out OUT": 2,
    "demo --recipe nothing": 2,
    "demo --no-such-flag 1": 2,
    "serve": 2,
    "serve no-such-checkpoint": 2,
    "chat no-such-checkpoint --question hello": 2,
    "study": 2,
    "study nothing": 2,
    "study --help": 0,
    "compare OUT OUT": 2,
    "corpus convert": 0,
    "doctor no-such-folder": 1,
    "memory --recipe nano": 0,
}
"""Command line -> exit status; OUT is an empty folder."""


def run_cli(line: str) -> tuple[int, str]:
    """Run `blm LINE` in this process: exit status and standard output."""
    from blm.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(line.split())
        except SystemExit as ended:
            return int(ended.code or 0), out.getvalue()
    return 0, out.getvalue()


def flags_of(text: str) -> dict[str, str]:
    """Flag or positional -> form of its value and its default, from the help of a command."""
    found: dict[str, str] = {}
    entry, words = "", list[str]()

    def close() -> None:
        if entry:
            told = re.findall(r"\((?:default: .*?|required|optional|repeatable)\)", " ".join(words))
            found[entry] = " ".join(told)

    for line in text.splitlines():
        line = line.strip("│").rstrip()
        match = FLAG.match(f" {line}" if line.startswith(" -") else line)
        if match and re.search(r"--\w", match["names"]):
            close()
            entry, words = f"{match['names']} {match['value'] or ''}".strip(), [match["rest"] or ""]
        elif entry:
            words.append(line.strip())
    close()
    return found


def record_commands() -> dict[str, Any]:
    """Every command with its flags."""
    from blm.cli import COMMANDS

    return {name: flags_of(run_cli(f"{name} --help")[1]) for name in COMMANDS}


def record_statuses() -> dict[str, int]:
    with tempfile.TemporaryDirectory() as out:
        return {line: run_cli(line.replace("OUT", out))[0] for line in CALLS}


def shape_of(value: Any) -> Any:
    """A JSON value as its keys and the types of its leaves; a list as its first element."""
    if isinstance(value, dict):
        return {str(key): shape_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shape_of(value[0])] if len(value) else []
    if isinstance(value, np.ndarray):
        return f"array {value.dtype} of {value.ndim} axes"
    return type(value).__name__


def record_files(run: Path) -> dict[str, Any]:
    """Files of a run folder, and what is in those that programs read."""
    from safetensors import safe_open

    files: dict[str, Any] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = re.sub(r"[0-9a-f]{12,}", "HASH", str(path.relative_to(run)))  # named by their content
        if path.name == "tokenizer.json":
            files[name] = path.suffix  # a vocabulary, in the form of the package `tokenizers`
        elif path.suffix == ".json":
            files[name] = shape_of(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            files[name] = shape_of(json.loads(path.read_text().splitlines()[0]))
        elif path.suffix == ".safetensors":
            with safe_open(path, "numpy") as tensors:
                shapes = {key: list(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
            known = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16]
            files[name] = {"tensors": len(shapes), "hash of names and shapes": known}
        else:
            files[name] = path.suffix
    return files


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "commands": record_commands,
    "statuses": record_statuses,
}


def recorded() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", ONE_COLUMN["COLUMNS"])
    yield


@pytest.mark.parametrize("part", PARTS)
def test_nothing_has_changed(part: str) -> None:
    now, before = json.loads(json.dumps(PARTS[part]())), recorded()[part]
    assert list(now) == list(before)
    for name in now:
        assert now[name] == before[name], name


def test_statuses_are_those_that_the_table_says() -> None:
    assert recorded()["statuses"] == CALLS


@pytest.mark.slow
def test_a_run_leaves_the_same_files(tmp_path: Path) -> None:
    blm = Path(sys.executable).with_name("blm")
    command = [blm, "demo", "--recipe", "ci", "--run", str(tmp_path / "ci")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    now, before = record_files(tmp_path / "ci"), recorded()["files"]
    assert now.keys() == before.keys()
    for name in now:
        assert now[name] == before[name], name


def main() -> None:
    os.environ.update(ONE_COLUMN)
    old = recorded() if RECORD.exists() else {}
    new = {part: record() for part, record in PARTS.items()}
    new["files"] = record_files(Path(sys.argv[1])) if sys.argv[1:] else old.get("files", {})
    parts = (
        f"{json.dumps(part)}: {{\n"
        + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in found.items())
        + "\n }"
        for part, found in new.items()
    )
    RECORD.write_text(
        "{\n " + ",\n ".join(parts) + "\n}\n"
    )  # a line a command or file: a change is read easily


if __name__ == "__main__":
    main()
