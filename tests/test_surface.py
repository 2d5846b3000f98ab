"""The public surface: every `__all__` is true, and registries answer wrong names well."""

from __future__ import annotations

import importlib
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from blm.types import BlmError, UnknownNameError, lookup

ROOT = Path(__file__).parents[1]
PACKAGES = [
    "blm", "blm.robots", "blm.tasks", "blm.planner", "blm.corpora", "blm.backbone", "blm.policy",
    "blm.evaluation", "blm.serving", "blm.runtime",
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


def pins() -> dict[str, str]:
    """Package -> the one version that constraints.txt allows; the platform's markers are left out."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [re.fullmatch(r"([a-z0-9.-]+)==([\w.]+)(?: ; .+)?", line) for line in lines if line[0] != "#"]
    assert all(found), "every line pins one version, and none names where a package is to be found"
    return {match[1]: match[2] for match in found if match}


def test_a_fresh_clone_gets_the_versions_that_were_tested() -> None:
    """A release of a package on any day may warn of something, and the tests take warnings for errors."""
    assert dependencies() - {"mani-skill"} <= pins().keys()  # it has an environment of its own


def required_by(name: str, seen: set[str]) -> set[str]:
    """Names of all installed distributions that `name` needs, itself among them."""
    if name in seen:
        return seen
    seen.add(name)
    for text in metadata.requires(name) or []:
        needed = Requirement(text)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            required_by(canonicalize_name(needed.name), seen)
    return seen


def test_transitive_packages_are_pinned_too() -> None:
    """Else a release of any of them could break a clone, although nothing in the clone has changed."""
    needed: set[str] = set()
    for name in dependencies() - {"mani-skill", "openvino", "bitsandbytes"}:  # not installed for the tests
        required_by(name, needed)
    assert len(needed) > 100
    assert needed - {"setuptools"} <= pins().keys()


def test_constraints_leave_a_cpu_build_of_torch_alone() -> None:
    """A local version label satisfies `==` without one (PEP 440); nothing asks for CUDA packages itself."""
    torch = pins()["torch"]
    assert SpecifierSet(f"=={torch}").contains(f"{torch}+cpu")
    assert not [name for name in dependencies() if name.startswith(("nvidia", "triton"))]


def test_packages_without_dependencies_are_pinned_and_explained() -> None:
    lines = (ROOT / "scripts/no-deps.txt").read_text().splitlines()
    page = (ROOT / "docs/dependencies.md").read_text()
    names = [line.partition("==") for line in lines if not line.startswith("#")]
    assert len(names) == 3
    for name, equals, rest in names:
        assert equals and re.match(r"[\d.]+ +# \w", rest) and f"`{name}`" in page
    assert not {name for name, _, _ in names} & dependencies(), "an extra would install their dependencies"
