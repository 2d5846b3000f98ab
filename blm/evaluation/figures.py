"""Figures of the report as inline SVG in the colours of the page."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from blm.evaluation.physical.perturbed import AxisSummary, PerturbedSummary
from blm.io import read_json_lines

_INK = "#010203"
"""Stands for the page's text colour while matplotlib draws; replaced by `currentColor`."""
_COLORS = ("#2f7fd8", "#d9822b", "#2f9e6e", "#b0579c")


@contextmanager
def _drawing(salt: str, size: tuple[float, float]) -> Iterator[tuple[Axes, list[str]]]:
    """Yield axes to draw on and a list, which then holds the SVG; `salt` makes it reproducible."""
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 11}
    style |= dict.fromkeys(inked, _INK)
    with matplotlib.rc_context(style):
        figure, drawn = Figure(figsize=size, layout="constrained"), list[str]()
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.15, color=_INK)
        yield axes, drawn
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    drawn.append(svg[svg.index("<svg") :].replace(_INK, "currentColor"))


def loss_curve(stage: str, log: Path) -> str:
    """Return losses over steps as inline SVG; empty for no rows."""
    rows = read_json_lines(log) if log.exists() else []
    names = [name for name in dict.fromkeys(k for row in rows for k in row) if "loss" in name]
    if not names:
        return ""
    with _drawing(stage, (5.6, 3.0)) as (axes, drawn):
        for name, color in zip(names, _COLORS, strict=False):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), color=color, linewidth=1.6)
        axes.set_xlabel("step")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(frameon=False)
    return drawn[0]


def axes_figure(summary: PerturbedSummary) -> str:
    """Return success by axis and level, with 95 % intervals and the twins, as inline SVG.

    Empty for a protocol without axes.
    """
    if not summary.axes:
        return ""
    with _drawing("axes", (10.5, 3.4)) as (axes, drawn):
        centres = [_draw_axis(axes, axis, number) for number, axis in enumerate(summary.axes)]
        axes.set_xticks(centres, [axis.axis for axis in summary.axes])
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(visible=False, axis="x")
        axes.set_ylabel("success once")
        axes.figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return drawn[0]


def _draw_axis(axes: Axes, axis: AxisSummary, number: int) -> float:
    """Draw the levels of one axis as a group of points from left to right; return its centre."""
    width = len(axis.levels) + 1.5
    places = [number * width + place for place in range(len(axis.levels))]
    rates = [level.summary.success_once for level in axis.levels]
    below = [rate.rate - rate.low for rate in rates]
    above = [rate.high - rate.rate for rate in rates]
    ends = places[0] - 0.4, places[-1] + 0.4
    names = ("levels, with 95 % interval", "the same scenes, unperturbed", "mean of the levels")
    points, twins, mean = names if number == 0 else ("_", "_", "_")  # name each kind of mark once
    axes.errorbar(
        places, [rate.rate for rate in rates], [below, above], fmt="o", color=_COLORS[0], ms=4.5, label=points
    )
    axes.hlines(axis.drop.second, *ends, color=_INK, linestyle=":", linewidth=1.4, label=twins)
    axes.hlines(axis.success.rate, *ends, color=_COLORS[1], linewidth=1.6, label=mean)
    return sum(places) / len(places)
