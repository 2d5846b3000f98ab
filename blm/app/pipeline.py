"""Run the stages of the whole loop in a run folder.

A stage is skipped if the run folder holds its result for the same settings, resumed if it was
interrupted, and refused if the folder holds a finished result of other settings: nothing is
overwritten.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from blm.app.model import check_device
from blm.app.recipe import MixtureSettings, Recipe
from blm.io import lock_folder, read_json, write_json, writing
from blm.tasks.randomization import NO_RANDOMIZATION
from blm.training.loop.distributed import Processes
from blm.training.loop.loop import MAY_CHANGE
from blm.training.policy.backbone_tuning import BackboneTuning
from blm.training.policy.cotraining import LanguageCotraining
from blm.training.run_inputs import run_together
from blm.types import BlmError

LEDGER = "stages.json"
"""File of the stages' records: stage name -> key, settings, done and seconds."""
RECIPE = "recipe.json"
"""The recipe of the latest call."""
NOT_IN_KEYS = ("workers", "device", "dtype", "attn_implementation")
"""Recipe fields that say how something is computed: another value gives the same result but for
rounding. Caches and training runs record the precision of their weights themselves."""
ADDED_TO_LOOP = {"precision": None}
"""Fields of `LoopConfig` that older run folders do not have, and their defaults."""
ADDED_TO_STAGE2 = {
    "loop": ADDED_TO_LOOP,
    "policy": {"dropout": 0.0, "state_noise": 0.0},
    "precision": "float16",
    "views": 0,
    "dims": 1024,
    "pool": 1,
    "frames": 1,
    "tune": asdict(BackboneTuning()),
    "cotrain": asdict(LanguageCotraining()),
}
"""The same for `Stage2Settings`, and for the parts of it."""
ADDED_TO_STAGE1 = {
    "mixture": asdict(MixtureSettings()),
    "epochs": 0.0,
    "training": {"loop": ADDED_TO_LOOP, "supervise_attention": 0.0},
    "schooling": {"eye": ADDED_TO_LOOP, "drill": ADDED_TO_LOOP, "pack_length": 0, "again": False},
}
ADDED_TO_CORPUS = {"answers": "reasoning", "randomization": asdict(NO_RANDOMIZATION), "free": 0.0}
"""The same for `Stage1Settings` and `CorpusSettings`."""
ADDED: dict[str, dict[str, Any]] = {
    "stage1": ADDED_TO_STAGE1,
    "stage2": ADDED_TO_STAGE2,
    "corpus": ADDED_TO_CORPUS,
    "demonstrations": {"randomization": asdict(NO_RANDOMIZATION)},
}
ADDED_FIELDS = {"prompt": "pictures_first"}
"""Recipe fields that older run folders do not have, and their defaults."""
REMOVED: dict[str, dict[str, Any]] = {
    "demonstrations": {"appearance": {"colors": 0.0, "light": 0.0, "camera": 0.0}},
}
"""Settings that only older run folders have, with the values that they had by default: the keys of
finished stages contain them."""
NEUTRAL = frozenset({*MAY_CHANGE, *NOT_IN_KEYS, "checkpoint_blocks", "corpora_folder"})
"""Names of settings that say how a result is computed, not which: a stage may be continued, and its
result used, with other values."""
SHOWN = 8
"""Maximum number of differing settings that an error lists."""


@dataclass(frozen=True)
class Stage:
    """One stage of the loop."""

    name: str
    title: str
    fields: tuple[str, ...]
    """Recipe fields that the result depends on, apart from those of the stages that it reads."""
    needs: tuple[str, ...]
    """Stages whose results it reads."""
    run: Callable[[Recipe, Path], None]
    writes: tuple[str, ...] = ()
    """Folders that it writes, relative to the run folder."""
    caches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """A folder of `writes` that is a cache -> beginnings of the dotted settings that do not affect
    it."""
    check: Callable[[Recipe, Path], None] | None = None
    """Raises BlmError for settings that the stage cannot fulfil. Takes seconds, and is called
    before the first stage of a run."""
    together: bool = False
    """Whether the processes of `accelerate launch` run it together; other stages run in one."""


@dataclass(frozen=True)
class StageRecord:
    """The record of one stage in a run folder's stages.json."""

    key: str
    """Hash of the settings that determine the result (`stage_key`)."""
    settings: dict[str, Any] | None
    """Recipe fields that the result depends on, as JSON; None in folders of older versions."""
    done: bool
    seconds: float
    """Time spent on the stage so far, over all calls [s]."""


def run_stages(stages: dict[str, Stage], names: list[str], recipe: Recipe, folder: Path) -> None:
    """Run the named stages in order.

    An unfinished stage may be run again with other settings; its old files are moved aside. Raises
    BlmError before anything is written: for a missing input, for settings that a stage cannot
    fulfil, for a folder with a finished stage of other settings or with files of another program,
    and if another run is using the folder. Of several processes (`accelerate launch`) all call
    this; the first alone checks, and writes recipe and ledger. Then only stages of `Stage.together`
    may be left to run.
    """
    check_device(recipe.device)
    processes = Processes.join(recipe.device)
    first = processes.first
    run_together(processes, lambda: _check(stages, names, recipe, folder, processes) if first else None)
    with ExitStack() as held:

        def begin() -> None:
            held.enter_context(lock_folder(folder))
            write_json(folder / RECIPE, to_json(recipe))

        run_together(processes, begin if first else lambda: None)
        for place, name in enumerate(names, start=1):
            _run_stage(stages, stages[name], recipe, folder, f"[{place}/{len(names)}]")


def _check(
    stages: dict[str, Stage], names: list[str], recipe: Recipe, folder: Path, processes: Processes
) -> None:
    """Raise BlmError if the stages cannot run; see `run_stages`."""
    with lock_folder(folder) if folder.exists() else nullcontext():
        require_run_folder(folder)
        require_settings(stages, names, recipe, folder)
        require_inputs(stages, names, folder)
    ledger = read_ledger(folder)
    waiting = [stages[name] for name in names if not (name in ledger and ledger[name].done)]
    if processes.count > 1 and (alone := [stage.name for stage in waiting if not stage.together]):
        shared = ", ".join(name for name, stage in stages.items() if stage.together)
        raise BlmError(
            f"{', '.join(alone)} in '{folder}' run in one process, but {processes.count} were launched; run "
            f"them without a launcher. Several processes run these stages: {shared}"
        )
    for stage in waiting:
        if stage.check is not None:
            stage.check(recipe, folder)


def _run_stage(stages: dict[str, Stage], stage: Stage, recipe: Recipe, folder: Path, place: str) -> None:
    """Run a stage in all processes, unless it is done; the first one writes the ledger."""
    processes = Processes.join(recipe.device)
    first = processes.first
    prepare = partial(_begin_stage, stages, stage, recipe, folder, place)
    begun = processes.gather_objects(run_together(processes, prepare if first else lambda: None))[0]
    if begun is None:
        return
    seconds, begin = begun.seconds, time.perf_counter()
    try:
        stage.run(recipe, folder)
        processes.wait()
    finally:
        if first:
            seconds += time.perf_counter() - begin
            _write_record(folder, stage.name, replace(begun, seconds=seconds))
    if first:
        _write_record(folder, stage.name, replace(begun, done=True, seconds=seconds))


def _begin_stage(
    stages: dict[str, Stage], stage: Stage, recipe: Recipe, folder: Path, place: str
) -> StageRecord | None:
    """Write and return the record of a stage that begins or continues; None if it is done."""
    console, ledger = Console(stderr=True), read_ledger(folder)
    key = stage_key(stages, stage, recipe, ledger)
    record = ledger.get(stage.name)
    if record and record.done:
        console.print(f"[dim]{place} {stage.title}: already done, skipped[/dim]")
        return None
    if record and record.key != key:
        _move_aside(stage, folder, record.settings, settings_of(stage, recipe))
        del ledger[stage.name]
        record = None
        key = stage_key(stages, stage, recipe, ledger)
    console.print(f"[bold]{place} {stage.title}[/bold]")
    seconds = record.seconds if record else 0.0
    settings = settings_of(stage, recipe)
    if record is not None and record.settings is not None:
        settings = with_neutral(settings, record.settings)  # of which the key is made
    begun = StageRecord(key, settings, done=False, seconds=seconds)
    _write_record(folder, stage.name, begun)
    return begun


def require_run_folder(folder: Path) -> None:
    """Raise BlmError for a recipe.json or stages.json that this program did not write."""
    if (path := folder / RECIPE).exists() and not _has_keys(read_json(path), {"name", "stage1", "stage2"}):
        raise BlmError(f"'{path}' was written by another program; name another --run folder")
    if (path := folder / LEDGER).exists():
        ledger = read_json(path)
        entries = ledger.values() if isinstance(ledger, dict) else [None]
        if not all(_has_keys(entry, {"key", "done", "seconds"}) for entry in entries):
            raise BlmError(f"'{path}' was written by another program; name another --run folder")


def _has_keys(value: Any, keys: set[str]) -> bool:
    return isinstance(value, dict) and keys <= value.keys()


def require_settings(stages: dict[str, Stage], names: list[str], recipe: Recipe, folder: Path) -> None:
    """Raise BlmError if one of the stages, or one that they read, is finished with other settings.

    The message names each setting that differs, with both values.
    """
    ledger = read_ledger(folder)
    stored = folder / RECIPE
    before = read_json(stored) if stored.exists() else {}
    lines = []
    for name in _with_inputs(stages, names):
        record = ledger.get(name)
        if not record or not record.done or record.key == stage_key(stages, stages[name], recipe, ledger):
            continue
        there = record.settings or {key: before.get(key) for key in stages[name].fields}
        gaps = list(differences(there, with_neutral(settings_of(stages[name], recipe), there)))
        lines += [f"  '{name}' is finished with {path} {old}, asked for: {new}" for path, old, new in gaps]
        if not gaps:
            lines.append(
                f"  '{name}' is finished with other settings, or its inputs were computed with others"
            )
    if lines:
        more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        raise BlmError(
            f"'{folder}' holds results of other settings; nothing was changed. Name another --run "
            "folder, or use the settings of this one:\n" + "\n".join(lines[:SHOWN]) + more
        )


def require_inputs(stages: dict[str, Stage], names: Sequence[str], folder: Path) -> None:
    """Raise BlmError if a stage lacks an input that no earlier stage in `names` produces."""
    available = {name for name, record in read_ledger(folder).items() if record.done}
    for name in names:
        if missing := [need for need in stages[name].needs if need not in available]:
            raise BlmError(
                f"'{name}' needs the result of {', '.join(missing)} in '{folder}'; run that stage first"
            )
        available.add(name)


def _with_inputs(stages: dict[str, Stage], names: Sequence[str]) -> list[str]:
    """Return the named stages and all stages that they read, in the order of the loop."""
    wanted = {*names}
    while more := {need for name in wanted for need in stages[name].needs} - wanted:
        wanted |= more
    return [name for name in stages if name in wanted]


def differences(there: Any, asked: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield the dotted name and both values, shortened, of every setting that differs."""
    asked = json.loads(json.dumps(asked)) if not path else asked
    if isinstance(there, dict) and isinstance(asked, dict):
        for name in dict.fromkeys((*there, *asked)):
            below = f"{path}.{name}" if path else name
            yield from differences(there.get(name), asked.get(name), below)
    elif there != asked:
        yield path, _short(there), _short(asked)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def settings_of(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """Return the recipe fields that the stage's result depends on, as JSON values."""
    values = {field: json_of(recipe, field) for field in stage.fields}
    return _without(values, ADDED_FIELDS)


def json_of(recipe: Recipe, field: str) -> Any:
    """Return a recipe field as JSON, without settings that older run folders do not have and that
    have their default: their keys stay the same."""
    value = to_json(getattr(recipe, field))
    value = _without(value, ADDED[field]) if field in ADDED else value
    return value | REMOVED[field] if field in REMOVED else value


def _without(value: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without those that have their default."""
    return {
        name: _without(item, defaults[name]) if isinstance(defaults.get(name), dict) else item
        for name, item in value.items()
        if (name, item) not in defaults.items()
    }


def _move_aside(stage: Stage, folder: Path, there: dict[str, Any] | None, asked: dict[str, Any]) -> None:
    """Rename unfinished files of other settings, so that they are neither used nor lost.

    A cache that the changed settings do not affect stays.
    """
    changed = [path for path, _, _ in differences(there, asked)] if there is not None else [""]
    for name in stage.writes:
        unaffected = stage.caches.get(name, ())
        if unaffected and all(path.startswith(unaffected) for path in changed):
            continue
        if (folder / name).exists():
            number = next(n for n in itertools.count(1) if not (folder / f"{name}.unfinished-{n}").exists())
            aside = folder / f"{name}.unfinished-{number}"
            with writing(folder):
                (folder / name).rename(aside)
            Console(stderr=True).print(f"moved unfinished files of other settings to {aside}", soft_wrap=True)


def stage_key(
    stages: dict[str, Stage], stage: Stage, recipe: Recipe, ledger: Mapping[str, StageRecord]
) -> str:
    """Return a hash of the recipe fields that determine the stage's result and its inputs.

    Neutral settings have the values that the ledger records, so they change no key.
    """
    own = settings_of(stage, recipe)
    record = ledger.get(stage.name)
    if record is not None and record.settings is not None:
        own = with_neutral(own, record.settings)
    inputs = [stage_key(stages, stages[need], recipe, ledger) for need in stage.needs]
    return hashlib.sha256(json.dumps([stage.name, own, inputs], sort_keys=True).encode()).hexdigest()[:16]


def with_neutral(asked: Any, there: Any) -> Any:
    """Return settings as asked for, with the neutral ones (`NEUTRAL`) as they are in `there`."""
    if not (isinstance(asked, dict) and isinstance(there, dict)):
        return asked
    return {
        name: there[name] if name in NEUTRAL else with_neutral(value, there.get(name))
        for name, value in asked.items()
        if name not in NEUTRAL or name in there
    }


def read_ledger(folder: Path) -> dict[str, StageRecord]:
    """Return the records of the stages of a run folder, by stage name."""
    path = folder / LEDGER
    content = read_json(path) if path.exists() else {}
    return {
        name: StageRecord(entry["key"], entry.get("settings"), entry["done"], entry["seconds"])
        for name, entry in content.items()
    }


def to_json(value: Any) -> Any:
    """Return a dataclass as a dict, and any other value unchanged."""
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def _write_record(folder: Path, name: str, record: StageRecord) -> None:
    path = folder / LEDGER
    content = read_json(path) if path.exists() else {}
    write_json(path, {**content, name: asdict(record)})
