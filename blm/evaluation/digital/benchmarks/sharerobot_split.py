"""A held-out split of ShareRobot's planning questions: by episode, seeded, checked for leaks.

BLM1 reports 4,100 questions: 10 kinds x 205 episodes x the 2 templates that each episode has of
each kind. The episodes are not published; this module draws such a set from the training files, so
that a model trained on the rest can be measured. It writes into the dataset's folder:
`planning/heldout/<kind>.json` (the held-out rows in the published form, which converters and leak
checks read), `training.json` (the episodes that remain for training) and, last, `split.json`
(counts, and the held-out episodes).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blm.evaluation.digital.benchmarks.layout import Row, find_files, read_rows
from blm.io import write_json
from blm.types import BlmError, require_numbers

SPLIT = "split.json"
TRAINING = "training.json"
HELD = "planning/heldout"
KINDS = (
    "discriminative_affordance_negative",
    "discriminative_affordance_positive",
    "future_prediction",
    "generative_affordance",
    "past_description",
    "planning_remaining_steps",
    "planning",
    "planning_with_context",
    "success_negative",
    "success_positive",
)
_MAKE = (
    "make the split anew: move split.json, training.json and planning/heldout away, then run `blm corpus "
    "sharerobot FOLDER`"
)


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """The size and the source of the held-out split."""

    episodes: int = 205
    """Number of held-out episodes."""
    templates: int = 2
    """Number of questions of each kind about each held-out episode."""
    seed: int = 0
    source: str = "planning/train"
    """Folder of the JSON files to draw from, below the dataset's folder."""

    def __post_init__(self) -> None:
        require_numbers(self, episodes=(1, 10**9), templates=(1, 10**6), seed=(0, 2**32 - 1))


@dataclass(frozen=True, kw_only=True)
class SplitSummary(SplitConfig):
    """What a split holds out, in numbers."""

    questions: int
    """Held-out questions."""
    training_episodes: int
    """Episodes left for training."""
    excluded: int
    """Episodes that were excluded, because a model was trained on them already."""


def kind_of(row: Row) -> str:
    """Return the kind of a task: 'Success_(Positive)_Task' -> 'success_positive'.

    Raises BlmError for an unknown task.
    """
    kind = row.text("task").lower().replace("(", "").replace(")", "").removesuffix("_task")
    if kind not in KINDS:
        raise row.error(f"task '{row.data['task']}' is unknown; valid: {', '.join(KINDS)}")
    return kind


def episodes_of(row: Row) -> list[str]:
    """Return the episodes that a row shows: that of its id, then any other that its images show."""
    named = [row.text("id"), *(str(name).rpartition("/")[0] for name in row.items("image"))]
    return list(dict.fromkeys(_episode(name) for name in named if "rt_frames_success/" in name) or named[:1])


def _episode(name: str) -> str:
    return name.rpartition("rt_frames_success/")[2].strip("/")


def split_sharerobot(folder: Path, config: SplitConfig, exclude: Collection[str] = ()) -> SplitSummary:
    """Draw the held-out questions and write both files; return the counts.

    `exclude` are episodes that a model was trained on already: none of them is held out. The same
    files, configuration and exclusions give the same split, whatever the order of rows. Raises
    BlmError when a split exists, when there are too few episodes, or when an episode is on both
    sides.
    """
    if (folder / SPLIT).exists():
        raise BlmError(f"'{folder / SPLIT}' exists; to {_MAKE}")
    files = find_files(folder, (f"{config.source}/*.json",), _MAKE)
    counts, shared = _count_questions(_rows(files, "counting"))
    able = sorted(
        name
        for name, of_kind in counts.items()
        if name not in shared | {*exclude} and min(of_kind[kind] for kind in KINDS) >= config.templates
    )
    if len(able) < config.episodes:
        raise BlmError(
            f"{len(able)} of {len(counts)} episodes of '{folder / config.source}' have {config.templates} "
            f"questions of each of the {len(KINDS)} kinds and are not excluded; needed: {config.episodes}"
        )
    order = np.random.default_rng(config.seed).permutation(len(able))
    held = {able[index] for index in order[: config.episodes]}
    rows = _draw(_rows(files, "drawing"), held, config)
    left = sorted(set(counts) - held)
    require_disjoint(rows, left, str(folder / SPLIT))
    summary = SplitSummary(
        **asdict(config), questions=len(rows), training_episodes=len(left), excluded=len(exclude)
    )
    contents: dict[Path, Any] = {
        folder / HELD / f"{kind}.json": [dict(row.data) for row in rows if kind_of(row) == kind]
        for kind in KINDS
    }
    contents[folder / TRAINING] = {**asdict(summary), "ids": left}
    contents[folder / SPLIT] = {**asdict(summary), "ids": sorted(held)}
    _write_all(contents)
    return summary


def _count_questions(rows: Iterable[Row]) -> tuple[dict[str, Counter[str]], set[str]]:
    """Return episode -> kind -> questions, and the episodes that share pictures with others."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    shared: set[str] = set()
    for row in rows:
        first, *others = episodes_of(row)
        counts[first][kind_of(row)] += 1
        shared |= {first, *others} if others else set()
    return counts, shared


def _write_all(contents: Mapping[Path, Any]) -> None:
    """Write JSON files; files that a killed run with the same split left are kept.

    Raises BlmError, before anything is written, if a file exists with other content.
    """
    for file, value in contents.items():
        if file.exists() and _read(file) != json.loads(json.dumps(value)):
            raise BlmError(f"'{file}' exists with other content; move it away")
    for file, value in contents.items():
        write_json(file, value)


def _rows(files: Sequence[Path], title: str) -> Iterator[Row]:
    """Yield the rows with one file in memory at a time: the ten files hold a million rows."""
    from rich.console import Console
    from rich.progress import track

    for file in track(files, title, console=Console(stderr=True), transient=True):
        yield from read_rows(file, _MAKE)


def _draw(rows: Iterable[Row], held: Collection[str], config: SplitConfig) -> list[Row]:
    cells: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        episode = episodes_of(row)[0]
        if episode in held:
            cells[kind_of(row), episode][json.dumps(row.data, sort_keys=True)] = row
    rng = np.random.default_rng((config.seed, 1))
    drawn = []
    for (kind, episode), cell in sorted(cells.items()):
        if len(cell) < config.templates:
            raise BlmError(
                f"episode '{episode}' has equal rows of kind {kind}; {config.templates} different ones needed"
            )
        picked = rng.choice(len(cell), config.templates, replace=False)
        drawn += [row for index, (_, row) in enumerate(sorted(cell.items())) if index in picked]
    return drawn


def require_disjoint(rows: Iterable[Row], training: Iterable[str], where: str) -> None:
    """Raise BlmError if an episode that a held-out row names or shows is also in training."""
    trained = {_episode(name) for name in training}
    leaks = sorted({name for row in rows for name in episodes_of(row) if name in trained})
    if leaks:
        some = ", ".join(leaks[:3])
        raise BlmError(f"{where}: {len(leaks)} held-out episodes are also trained on ({some}); {_MAKE}")


def read_training(file: Path) -> list[str]:
    """Read the training episodes: of a `training.json`, or of any JSON list of ids.

    Raises BlmError for a file of another form.
    """
    value = _read(file)
    ids = value.get("ids") if isinstance(value, dict) else value
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise BlmError(f"'{file}' is not a list of episode ids; {_MAKE}")
    return [_episode(name) for name in ids]


def read_split(folder: Path) -> list[Row]:
    """Return the held-out rows, after checking their number and their episodes again.

    Raises BlmError if one of the episodes is in training.
    """
    stated = _read(folder / SPLIT)
    rows = [row for kind in KINDS for row in read_rows(folder / HELD / f"{kind}.json", _MAKE)]
    found = {"questions": len(rows), "ids": sorted({episodes_of(row)[0] for row in rows})}
    if not isinstance(stated, dict) or any(stated.get(name) != value for name, value in found.items()):
        raise BlmError(
            f"'{folder / SPLIT}' does not fit the {len(rows)} rows in '{folder / HELD}': files were mixed or "
            f"altered; {_MAKE}"
        )
    require_disjoint(rows, read_training(folder / TRAINING), str(folder / SPLIT))
    return rows


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BlmError(f"cannot read '{file}': {error}; {_MAKE}") from error
