"""The whole loop as a list of stages over one run folder; each command of the CLI is one of them.

A stage is skipped when the run folder already holds its result for the same settings, continued when it was
interrupted, and refused when the folder holds the result of other settings: nothing is overwritten.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from blm.io import read_json, write_json
from blm.recipes import Recipe
from blm.types import BlmError

LEDGER = "stages.json"


@dataclass(frozen=True)
class Stage:
    """One step of the loop."""

    name: str
    title: str
    fields: tuple[str, ...]
    """Recipe fields that the result depends on."""
    needs: tuple[str, ...]
    """Stages whose results it reads."""
    run: Callable[[Recipe, Path], None]


def run_stages(stages: dict[str, Stage], names: list[str], recipe: Recipe, folder: Path) -> None:
    """Run the named stages in order. Raises BlmError for a missing input or a folder of other settings."""
    console = Console(stderr=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "recipe.json", to_json(recipe))
    for place, name in enumerate(names, start=1):
        stage = stages[name]
        ledger = read_ledger(folder)
        key = stage_key(stages, stage, recipe)
        entry = ledger.get(name)
        if entry and entry["key"] != key:
            raise BlmError(
                f"'{folder}' holds a '{name}' made with other settings ({', '.join(stage.fields)}); "
                "name another --run folder, or remove this one"
            )
        missing = [need for need in stage.needs if not ledger.get(need, {}).get("done")]
        if missing:
            raise BlmError(f"'{name}' needs the result of {', '.join(missing)} in '{folder}': run that first")
        if entry and entry["done"]:
            console.print(f"[dim][{place}/{len(names)}] {stage.title}: done before, skipped[/dim]")
            continue
        console.print(f"[bold][{place}/{len(names)}] {stage.title}[/bold]")
        seconds = entry["seconds"] if entry else 0.0
        begin = time.perf_counter()
        try:
            _record(folder, name, {"key": key, "done": False, "seconds": seconds})
            stage.run(recipe, folder)
        finally:
            seconds += time.perf_counter() - begin
            _record(folder, name, {"key": key, "done": False, "seconds": seconds})
        _record(folder, name, {"key": key, "done": True, "seconds": seconds})


def stage_key(stages: dict[str, Stage], stage: Stage, recipe: Recipe) -> str:
    """Hash of everything that determines the stage's result: its recipe fields and those of its inputs."""
    own = {field: to_json(getattr(recipe, field)) for field in stage.fields}
    inputs = [stage_key(stages, stages[need], recipe) for need in stage.needs]
    return hashlib.sha256(json.dumps([stage.name, own, inputs], sort_keys=True).encode()).hexdigest()[:16]


def read_ledger(folder: Path) -> dict[str, Any]:
    """Return stage name -> {key, done, seconds} of a run folder."""
    path = folder / LEDGER
    return read_json(path) if path.exists() else {}


def to_json(value: Any) -> Any:
    """Dataclasses to dicts, anything else as it is."""
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def _record(folder: Path, name: str, entry: dict[str, Any]) -> None:
    write_json(folder / LEDGER, {**read_ledger(folder), name: entry})
