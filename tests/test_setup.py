"""Set-up: what the scripts refuse; slowly: a fresh clone becomes an environment, by uv and by pip."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    # make hands its own variables down to what it starts
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["sh", "scripts/setup.sh", *arguments]
    return subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True)


def test_an_unknown_set_is_refused_before_installation(tmp_path: Path) -> None:
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    for wrong in ((), ("all",)):
        ended = run(*wrong, cwd=tmp_path)
        assert ended.returncode == 2 and "choose demo or dev" in ended.stderr
    assert not (tmp_path / ".venv").exists()


def test_an_old_python_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\necho 'Python 3.11 or newer is needed; this is 3.9.1' >&2\nexit 1\n")
    old.chmod(0o755)
    ended = run("demo", str(old), cwd=tmp_path)
    assert ended.returncode == 1 and "3.11 or newer" in ended.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The committed files of this project, as `git clone` gives them."""
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(tmp_path / "clone", filter="data")
    return tmp_path / "clone"


@pytest.mark.slow
@pytest.mark.parametrize("pip", ["", "1"], ids=["uv", "pip"])
def test_a_fresh_clone_runs_what_it_needs(clone: Path, pip: str) -> None:
    """Downloads packages: seconds with uv, minutes with pip. Each phase is one line; nothing is compiled."""
    ended = run("demo", cwd=clone, PIP=pip, CC="/bin/false")
    assert ended.returncode == 0, ended.stderr[-2000:]
    phases = re.findall(r"^setup \[\d+ s\] (\S+)", ended.stdout, re.MULTILINE)
    assert phases == ["1/2", "2/2", "ready"]
    assert ("pip" if pip else "uv") in ended.stdout
    python = clone / ".venv/bin/python"
    code = "import blm, torch, mujoco; from blm.cli import main; print(torch.__version__)"
    version = subprocess.run([python, "-c", code], cwd=clone, capture_output=True, text=True, check=True)
    assert version.stdout.startswith("2.")
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    ).stdout
    assert not re.search(r"^(pytest|ray|mkdocs|playwright|llama)", listed, re.MULTILINE | re.IGNORECASE)
    again = run("demo", cwd=clone, PIP=pip)
    assert again.returncode == 0
