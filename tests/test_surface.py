"""The public surface: every `__all__` is true, and registries answer wrong names well."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

import pytest

from blm.types import BlmError, UnknownNameError, lookup

ROOT = Path(__file__).parents[1]
PACKAGES = [
    "blm", "blm.robots", "blm.tasks", "blm.demos", "blm.corpora", "blm.backbone", "blm.policy",
    "blm.evaluation", "blm.serving",
]  # fmt: skip


@pytest.mark.parametrize("name", PACKAGES)
def test_all_members_exist(name):
    package = importlib.import_module(name)
    assert len(set(package.__all__)) == len(package.__all__)
    for member in package.__all__:
        assert getattr(package, member) is not None
    assert package.__doc__


def test_unknown_names_list_the_valid_ones_and_the_closest():
    with pytest.raises(
        UnknownNameError, match=r"unknown robot 'xarm9'.*Did you mean 'xarm.'\?.*panda, xarm6"
    ):
        lookup("robot", "xarm9", {"xarm6": 1, "panda": 2})
    assert issubclass(UnknownNameError, BlmError)


def dependencies() -> set[str]:
    """Names of all packages that pyproject.toml asks for, extras too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(n for names in project["optional-dependencies"].values() for n in names),
    ]
    return {re.split(r"[<>=!\[ ]", text)[0] for text in wanted} - {"blm"}


def test_every_dependency_is_explained() -> None:
    page = (ROOT / "docs/dependencies.md").read_text()
    for name in dependencies():
        assert f"`{name}`" in page, name


def test_a_fresh_clone_gets_the_versions_that_were_tested() -> None:
    """A release of a package on any day may warn of something, and the tests take warnings for errors."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", pin) for pin in pins)
    assert {pin.partition("==")[0] for pin in pins} == dependencies() - {"mani-skill"}, "it has its own venv"
