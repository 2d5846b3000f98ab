"""Plot the ablations in results/studies/*.json as docs/figures/studies.svg: success rates, 95 % intervals.

The studies `models` and `baseline` are left out, because their models were trained for unequal numbers of
steps or for too few.

    python docs/figures/make_studies.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
TITLES = {
    "backbone": "backbone before and after Stage I",
    "future": "weight of the future-prediction loss",
    "layer": "tapped block",
    "latents": "number of intent tokens",
    "cameras": "cameras",
    "side_view": "cameras, trained later",
    "actions": "action representation",
}
"""File name of each study -> title of its panel, from top to bottom."""
INK, FIRST, OTHER = "#6b7280", "#2563eb", "#d97706"


def main() -> None:
    studies = [json.loads((ROOT / f"results/studies/{name}.json").read_text()) for name in TITLES]
    sizes = [len(study["variants"]) for study in studies]
    mpl.rcParams.update({"svg.hashsalt": "blm", "font.size": 9, "text.color": INK, "axes.edgecolor": INK})
    figure = Figure(figsize=(7.2, 0.27 * sum(sizes) + 0.22 * len(sizes) + 0.6), layout="constrained")
    panels = figure.subplots(len(studies), 1, sharex=True, height_ratios=sizes, squeeze=False)[:, 0]
    for panel, study, title in zip(panels, studies, TITLES.values(), strict=True):
        for place, variant in enumerate(study["variants"]):
            won, colour = variant["success"], OTHER if place else FIRST
            left, right = won["rate"] - won["low"], won["high"] - won["rate"]
            panel.errorbar(
                100 * won["rate"], place, xerr=[[100 * left], [100 * right]], fmt="o", color=colour
            )
        panel.set_yticks(range(len(study["variants"])), [row["variant"] for row in study["variants"]])
        panel.set_ylim(len(study["variants"]) - 0.5, -0.5)
        panel.tick_params(colors=INK, length=0)
        panel.grid(axis="x", color=INK, alpha=0.2)
        panel.spines[["top", "right", "bottom"]].set_visible(False)
        panel.set_title(title, loc="left", fontsize=9, fontweight="bold", pad=2)
    panels[-1].set_xlim(0, 100)
    panels[-1].set_xlabel("success rate [%], 95 % interval", color=INK)
    figure.savefig(ROOT / "docs/figures/studies.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
