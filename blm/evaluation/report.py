"""One HTML page about one run: what ran, on what, how well, how sure, what it does not show.

Styles, curves (SVG) and videos are inside the page. What is missing is shown as "not run".
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from blm.evaluation.digital.table import PaperTable
from blm.evaluation.physical.outcome import REASONS
from blm.evaluation.results import compare, load_result
from blm.evaluation.statistics import success_rate
from blm.io import write_text
from blm.robots import ROBOTS
from blm.tasks import TASKS
from blm.types import BlmError, ContractError

MAX_VIDEOS = 24
_INK = "#010203"
"""Stands for the page's text colour while matplotlib draws; replaced by `currentColor`."""
_COLORS = ("#2f7fd8", "#d9822b", "#2f9e6e", "#b0579c")


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Where a run's results lie. A path may be None or not exist: that part was not run."""

    title: str
    commands: Sequence[str] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The resolved recipe, JSON-able."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Stage -> wall time [s], in order."""
    collection: Path | None = None
    """summary.json of the collector."""
    sheet: Path | None = None
    """Picture of the demonstrations, PNG."""
    questions: Mapping[str, int] = field(default_factory=dict)
    """Name of a question set -> how many."""
    logs: Mapping[str, Path] = field(default_factory=dict)
    """Training stage -> log.jsonl."""
    digital: Mapping[str, Path] = field(default_factory=dict)
    """Model -> result.json; the first is the model that the report is about."""
    papers: Sequence[PaperTable] = ()
    """Tables of the paper with our rows in them."""
    retention: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Training run -> what it kept of the base model's language, name -> number."""
    physical: Mapping[str, Path] = field(default_factory=dict)
    """The same for closed-loop results; the others are baselines and the expert."""
    dialogue: Path | None = None
    """A conversation about a picture: {"picture": file beside it, "lines": [[question, answer], ..]}."""


def build_report(data: ReportData, out: Path) -> None:
    """Write the page to `out`, atomically."""
    physical, digital = _results(data.physical), _results(data.digital)
    for name, result in physical.items():
        if result["protocol"]["purpose"] != "evaluation":
            raise BlmError(
                f"'{name}' is a {result['protocol']['purpose']} on training scenes, no score; leave it out"
            )
    machines = [result["machine"] for result in (*physical.values(), *digital.values())]
    page = _template().render(
        data=data,
        physical=physical,
        digital=digital,
        differences={name: _difference(physical, name) for name in physical},
        grid=_grid(physical),
        reasons=REASONS,
        videos={name: _videos(data.physical[name], result) for name, result in physical.items()},
        dialogue=_dialogue(data.dialogue),
        collection=_read(data.collection).get("robots", {}),
        sheet=_embedded(data.sheet, "image/png") if data.sheet and data.sheet.exists() else "",
        curves={stage: _curve(stage, path) for stage, path in data.logs.items()},
        machine=machines[0] if machines else {},
        robots=ROBOTS,
        tasks=TASKS,
    )
    write_text(out, page)


def _template() -> Any:
    options: Any = {"autoescape": True, "undefined": StrictUndefined}
    environment = Environment(trim_blocks=True, lstrip_blocks=True, **options)
    environment.filters |= {"percent": lambda share: f"{100 * share:.0f} %", "duration": _duration}
    return environment.from_string(files("blm.evaluation").joinpath("report.html.jinja").read_text())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _read(path: Path | None) -> dict[str, Any]:
    return json.loads(path.read_text()) if path is not None and path.exists() else {}


def _results(paths: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    return {name: load_result(path) for name, path in paths.items() if path.exists()}


def _grid(results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The first model's cells by robot and task, with its rates over rows and columns of the table.

    "others" has, for every cell, the rates of the other policies that were evaluated there.
    """
    if not results:
        return {}
    (_, model), *others = results.items()
    outcomes = [(row["robot"], row["task"], row["success_once"]) for row in model["rows"]]
    marginal = {
        name: asdict(success_rate([success for *place, success in outcomes if name in place]))
        for name in (*model["protocol"]["robots"], *model["protocol"]["tasks"])
    }
    beside: dict[str, dict[str, Any]] = {}
    for name, result in others:
        for cell in result["cells"]:
            key = f"{cell['robot']}/{cell['task']}"
            beside.setdefault(key, {})[name] = cell["success_once"]
    cells = {f"{cell['robot']}/{cell['task']}": cell for cell in model["cells"]}
    return {"cells": cells, "marginal": marginal, "others": beside}


def _difference(results: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any] | None:
    """First model minus this one on the same scenes; None where protocols differ."""
    first = next(iter(results))
    try:
        return None if name == first else asdict(compare(results[first], results[name]))
    except ContractError:
        return None


def _videos(path: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The filmed episodes of a result, with the film as a data URI."""
    films = []
    for row in [row for row in result["rows"] if row["video"]][:MAX_VIDEOS]:
        film = path.parent / row["video"]
        if not film.exists():
            raise BlmError(f"video '{film}' of the result is missing; keep it beside result.json")
        films.append({**row, "uri": _embedded(film, "video/mp4")})
    return films


def _dialogue(path: Path | None) -> dict[str, Any]:
    """The conversation with its picture as a data URI; empty if there was none."""
    if path is None or not (found := _read(path)):
        return {}
    return {**found, "uri": _embedded(path.parent / found["picture"], "image/png")}


def _embedded(file: Path, kind: str) -> str:
    """The file as a data URI."""
    return f"data:{kind};base64," + base64.b64encode(file.read_bytes()).decode()


def _curve(stage: str, log: Path) -> str:
    """Losses over steps as inline SVG; empty for no rows. Colours follow the page's theme."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    names = [name for name in dict.fromkeys(k for row in rows for k in row) if "loss" in name]
    if not names:
        return ""
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": stage, "font.size": 11}
    style |= dict.fromkeys(inked, _INK)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.6, 3.0), layout="constrained")
        axes = figure.subplots()
        for name, color in zip(names, _COLORS, strict=False):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), color=color, linewidth=1.6)
        axes.set_xlabel("step")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.15, color=_INK)
        axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")
