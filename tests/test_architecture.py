"""The design as a test: who may import whom, limits on files, classes and functions, what loads torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "blm"
FILES = sorted(SOURCE.rglob("*.py"))
OPEN = {
    "errors": "",
    "action_space": "errors",
    "pictures": "errors",
    "types": "errors action_space pictures",
    "seeds": "",
    "addresses": "types",
    "chunks": "types",
    "io": "types",
    "gymnasium_ids": "",
}
"""Rooms that all others may import, and what they import of each other."""
ALLOWED = {
    "jobs": "",
    "media": "",
    "robots": "",
    "tasks": "robots",
    "datasets": "",
    "planner": "jobs robots tasks datasets",
    "backbone": "media",
    "edge": "datasets",
    "corpora": "jobs media robots tasks datasets backbone",
    "layers": "",
    "bridge": "layers",
    "policy": "datasets backbone layers bridge",
    "training": "jobs media datasets corpora backbone bridge policy",
    "baselines": "datasets policy training",
    "evaluation": "jobs media robots tasks",
    "serving": "robots tasks",
    "runtime": "serving",
    "app": "jobs media robots tasks datasets planner backbone corpora bridge policy training baselines "
    "edge evaluation serving runtime",
    "cli": "jobs media robots tasks datasets planner backbone corpora bridge policy training baselines "
    "edge evaluation serving runtime app",
    "__init__": "app",
}
"""Room -> rooms below it that it may import; no file is exempt."""
FILE_LINES, CLASS_LINES, FUNCTION_LINES, PARAMETERS = 400, 250, 60, 8


def module_of(path: Path) -> str:
    """Name of the top-level module that a source file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Top-level `blm` modules that a file imports anywhere in it, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names if name.split(".")[0] == "blm"]
    return {p[1] for p in parts if len(p) > 1}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_follow_the_table(path):
    module = module_of(path)
    allowed = {*OPEN[module].split()} if module in OPEN else {*OPEN, *ALLOWED[module].split()}
    extra = imported_modules(path) - {module} - allowed
    assert not extra, f"{path.name} may not import {sorted(extra)}; {module} may: {sorted(allowed)}"


def test_the_table_names_every_package_and_forbids_higher_imports():
    assert {module_of(path) for path in FILES} == {*OPEN, *ALLOWED}
    order = list(ALLOWED)
    for room, below in ALLOWED.items():
        names = below.split() if room != "__init__" else []
        assert all(order.index(name) < order.index(room) for name in names), room


@pytest.mark.parametrize("path", sorted((SOURCE / "runtime").glob("*.py")), ids=lambda p: p.name)
def test_the_runtime_imports_only_the_client_of_serving(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("blm.serving"):
            assert node.module in ("blm.serving.client", "blm.serving.protocols.openpi.wire"), node.module
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.startswith(("blm", "torch")) for name in names), names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_budgets(path):
    text = path.read_text()
    assert len(text.splitlines()) <= FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < CLASS_LINES, f"{path.name}:{node.name} is too long"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{path.name}:{node.name} is too long"
            arguments = [a for a in node.args.args if a.arg not in ("self", "cls")] + node.args.kwonlyargs
            assert len(arguments) <= PARAMETERS, f"{path.name}:{node.name} takes {len(arguments)} parameters"


def test_no_wildcard_pickle_or_remote_code():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in getattr(node, "names", [])]
                if isinstance(node, ast.Import | ast.ImportFrom)
                else []
            )
            assert not {"*", "pickle", "torchvision"} & set(names), f"{path}: {names}"
            keywords = node.keywords if isinstance(node, ast.Call) else []
            assert "trust_remote_code" not in {k.arg for k in keywords}, path


@pytest.mark.parametrize(
    "module",
    ["blm", "blm.cli", "blm.types", "blm.evaluation", "blm.serving.client", "blm.runtime", "blm.edge.policy"],
)
def test_loads_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_import_does_nothing(path):
    """Files define names; on import they only register our vision towers with transformers, and our
    environments with Gymnasium."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            file, statement = str(path.relative_to(SOURCE)), ast.unparse(node)
            towers = ("backbone/nano/model.py", "backbone/smol/model.py")
            environments = (file, statement) == ("tasks/__init__.py", "register()")
            assert environments or (statement.startswith("Auto") and file in towers), statement
        assert not isinstance(node, ast.For | ast.While | ast.With | ast.Try), f"{path}:{node.lineno}"
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "TYPE_CHECKING", f"{path}:{node.lineno}"
