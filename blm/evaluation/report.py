"""One HTML page about one run: commands, machine, scores with intervals, videos, limitations.

Styles, loss curves (SVG) and videos are embedded. A missing part is shown as "not run".
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, StrictUndefined, Template

from blm.evaluation.comparison import TRAINING_LABELS, compare, require_same_training
from blm.evaluation.conditions import PLAIN
from blm.evaluation.digital.reproduction import RowGaps, gap_cells
from blm.evaluation.digital.result import DigitalResult
from blm.evaluation.digital.table import PaperTable
from blm.evaluation.figures import axes_figure, loss_curve
from blm.evaluation.physical.outcome import REASONS
from blm.evaluation.physical.result import EpisodeResult, PhysicalResult
from blm.evaluation.physical.success import SuccessSummary
from blm.evaluation.result_files import load_result
from blm.evaluation.statistics import Difference, Rate, success_rate
from blm.io import write_text
from blm.robots import ROBOTS
from blm.tasks import TASKS
from blm.types import BlmError, ContractError

MAX_VIDEOS = 24


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Paths to the results of a run. One that is None or does not exist was not run."""

    title: str
    commands: Sequence[str] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The resolved recipe, JSON-able."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Stage -> wall time [s], in the order of execution."""
    collection: Path | None = None
    """summary.json of the demonstrations."""
    sheet: Path | None = None
    """Contact sheet of the demonstrations, PNG."""
    questions: Mapping[str, int] = field(default_factory=dict)
    """Name of a question set -> number of questions."""
    logs: Mapping[str, Path] = field(default_factory=dict)
    """Training stage -> log.jsonl."""
    digital: Mapping[str, Path] = field(default_factory=dict)
    """Model -> result.json of a question benchmark; the report is about the first model."""
    papers: Sequence[PaperTable] = ()
    """Tables of the paper with our results as further rows."""
    gaps: Sequence[RowGaps] = ()
    """What is missing to reproduce the rows of these tables."""
    mixture: Path | None = None
    """mixture.json of Stage I: its sources, and the corpora that were missing."""
    retention: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Training run -> name of a retention metric -> value, measured against the base model."""
    physical: Mapping[str, Path] = field(default_factory=dict)
    """Policy -> result.json of its closed-loop evaluation; the report is about the first policy."""
    across_training: bool = False
    """Put augmented beside zero-shot results of a perturbed protocol, with labels."""
    dialogue: Path | None = None
    """A conversation about an image: {"image": FILE, "lines": [[question, answer], ..]}."""


@dataclass(frozen=True)
class CellGrid:
    """The table of success rates by robot and task. Cells are named "robot/task"."""

    cells: Mapping[str, SuccessSummary]
    """Success rates of the first policy."""
    marginal: Mapping[str, Rate]
    """Robot or task -> success rate of the first policy over all its cells."""
    others: Mapping[str, Mapping[str, Rate]]
    """Cell -> success rates of the other policies there."""


@dataclass(frozen=True)
class Film:
    """A recorded episode with its video as a data URI."""

    episode: EpisodeResult
    uri: str


@dataclass(frozen=True)
class Dialogue:
    """A conversation about one image, which is a data URI."""

    uri: str
    lines: Sequence[tuple[str, str]]
    """Questions and answers."""


def build_report(data: ReportData, out: Path) -> None:
    """Write the page to `out`, atomically.

    Raises BlmError for a result that is not an evaluation, is damaged or lacks its videos, and, unless
    `across_training`, for augmented beside zero-shot results.
    """
    physical = _load_all(data.physical, PhysicalResult)
    digital = _load_all(data.digital, DigitalResult)
    for name, result in physical.items():
        if result.protocol.purpose != "evaluation":
            raise BlmError(
                f"'{name}' is a {result.protocol.purpose}, which is not a score: leave it out of the report"
            )
    if not data.across_training:
        require_same_training(physical)
    machines = [result.machine for result in (*physical.values(), *digital.values())]
    page = _template().render(
        gaps=gap_cells(data.gaps) if data.gaps else [],
        data=data,
        physical=physical,
        digital=digital,
        differences={name: _difference(physical, name) for name in physical},
        grid=_grid(physical) if physical else None,
        reasons=REASONS,
        trainings=TRAINING_LABELS,
        axes_figures={
            name: axes_figure(result.summary.perturbed)
            for name, result in physical.items()
            if result.summary.perturbed is not None
        },
        videos={name: _films(data.physical[name], result) for name, result in physical.items()},
        dialogue=_dialogue(data.dialogue),
        collection=_read(data.collection).get("robots", {}),
        sheet=_embedded(data.sheet, "image/png") if data.sheet and data.sheet.exists() else "",
        mixture=_read(data.mixture),
        curves={stage: loss_curve(stage, path) for stage, path in data.logs.items()},
        machine=machines[0].to_json() if machines else {},
        robots=ROBOTS,
        tasks=TASKS,
    )
    write_text(out, page)


def _template() -> Template:
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "percent": lambda share: f"{100 * share:.0f} %",
        "duration": _duration,
        "protocol": lambda protocol: protocol.to_json(),
    }
    return environment.from_string(files("blm.evaluation").joinpath("report.html.jinja").read_text())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _read(path: Path | None) -> dict[str, Any]:
    """Return the content of a JSON file; empty if it does not exist."""
    return json.loads(path.read_text()) if path is not None and path.exists() else {}


ResultT = TypeVar("ResultT", PhysicalResult, DigitalResult)


def _load_all(paths: Mapping[str, Path], kind: type[ResultT]) -> dict[str, ResultT]:
    """Load the results that exist. Raises BlmError for a result of the other kind."""
    found: dict[str, ResultT] = {}
    for name, path in paths.items():
        if not path.exists():
            continue
        result = load_result(path)
        if not isinstance(result, kind):
            raise BlmError(f"'{path}' is a {result.kind} result; this part of the report is {kind.kind}")
        found[name] = result
    return found


def _grid(results: Mapping[str, PhysicalResult]) -> CellGrid:
    (_, model), *others = results.items()
    marginal = {
        name: success_rate(
            [e.success_once for e in model.episodes if name in (e.robot, e.task) and e.condition == PLAIN]
        )
        for name in (*model.protocol.robots, *model.protocol.tasks)
    }
    beside: dict[str, dict[str, Rate]] = {}
    for name, result in others:
        for cell in result.summary.cells:
            beside.setdefault(cell.name, {})[name] = cell.summary.success_once
    cells = {cell.name: cell.summary for cell in model.summary.cells}
    return CellGrid(cells, marginal, beside)


def _difference(results: Mapping[str, PhysicalResult], name: str) -> Difference | None:
    """Return first policy minus this one on the same scenes; None if the protocols differ."""
    first = next(iter(results))
    try:
        return None if name == first else compare(results[first], results[name], across_training=True)
    except ContractError:
        return None


def _films(path: Path, result: PhysicalResult) -> list[Film]:
    """Return the first episodes of a result that have a video."""
    filmed = [(episode, episode.video) for episode in result.episodes if episode.video is not None]
    films = []
    for episode, video in filmed[:MAX_VIDEOS]:
        file = path.parent / video
        if not file.exists():
            raise BlmError(f"video '{file}' of the result is missing; keep it next to result.json")
        films.append(Film(episode, _embedded(file, "video/mp4")))
    return films


def _dialogue(path: Path | None) -> Dialogue | None:
    """Read the conversation; None if there is none."""
    if path is None or not (found := _read(path)):
        return None
    lines = [(question, answer) for question, answer in found["lines"]]
    return Dialogue(_embedded(path.parent / found["picture"], "image/png"), lines)


def _embedded(file: Path, kind: str) -> str:
    """Return the file as a data URI."""
    return f"data:{kind};base64," + base64.b64encode(file.read_bytes()).decode()
