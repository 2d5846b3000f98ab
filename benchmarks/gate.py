"""Localisation accuracy of nano's vision tower on held-out images: is it sufficient for control?

    python benchmarks/gate.py BACKBONE CORPUS [--out gate.json]

BACKBONE is the folder of a nano. CORPUS is a corpus that Stage I was not trained on, with scan
turns (`blm corpus build` without --no-teach, from other seeds). Points are compared in pixels of
112, positions relative to the robot in mm, by view and robot. The required accuracy is: 90 % of
points within 3 px; medians of objects, goals and gripper within 10 mm.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from blm.backbone import Backbone
from blm.backbone.grounding import REACH, GroundingTower
from blm.corpora import read_corpus
from blm.media import load_pixels
from blm.training.pretraining.vision_tower import (
    ScannedView,
    expected_points,
    grounding_targets,
    scanned_views,
)

PIXELS, MILLIMETRES = 3.0, 10.0


def main(
    backbone: tyro.conf.Positional[Path], corpus: tyro.conf.Positional[Path], out: Path | None = None
) -> None:
    """Print medians and 90th percentiles, and write them to a file."""
    torch.set_num_threads(1)
    model = Backbone.load(backbone)
    views, robots = list[ScannedView](), list[str]()
    for row in read_corpus(corpus):
        found = scanned_views(row, corpus)
        views += found
        robots += [row.id.split("/")[1]] * len(found)
    pixels, millimetres, missed = errors(model, views, robots)
    result: dict[str, Any] = {
        "corpus": str(corpus),
        "pictures": len(views),
        "pixels": {name: summary(values) for name, values in sorted(pixels.items())},
        "mm": {name: summary(values) for name, values in sorted(millimetres.items())},
        "wrong_things_a_picture": {name: float(np.mean(values)) for name, values in sorted(missed.items())},
    }
    result["within_pixels"] = all(one["p90"] <= PIXELS for one in result["pixels"].values())
    result["within_mm"] = all(one["median"] <= MILLIMETRES for one in result["mm"].values())
    print(json.dumps(result, indent=1))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


def summary(values: list[float]) -> dict[str, Any]:
    return {
        "n": len(values),
        "median": round(float(np.median(values)), 2),
        "p90": round(float(np.quantile(values, 0.9)), 2),
    }


@torch.no_grad()
def errors(
    model: Backbone, views: list[ScannedView], robots: list[str]
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, list[float]]]:
    """Return errors in px by view and robot, errors in mm by view and object, and wrong objects.

    The last are the numbers of wrong objects per image by view.
    """
    eye: GroundingTower = model.model.base_model.vision_tower
    config = eye.config
    targets, things = grounding_targets(views, config), config.things
    pixels, millimetres, missed = (defaultdict[str, list[float]](list) for _ in range(3))
    for begin in range(0, len(views), 64):
        some = slice(begin, begin + 64)
        pictures = [load_pixels(view.image, view.root) for view in views[some]]
        read = model.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        features, around = eye.features(read)
        logs, points, metres = (
            eye.maps(features)[:, : len(things)],
            targets.points[some],
            targets.metres[some],
        )
        off, there = config.image_size * (expected_points(logs) - points).norm(dim=-1), points[..., 0] >= 0
        wrong = ((logs[..., -1].exp() < 0.5) != there).sum(1)
        for row in (~points[:, 0, 0].isnan()).nonzero()[:, 0].tolist():
            view, robot = views[begin + row].name, robots[begin + row]
            for name in (view, f"{robot}, {view}"):
                pixels[name] += off[row][there[row]].tolist()
            missed[view].append(float(wrong[row]))
        rows, which = (~metres[..., 0].isnan()).nonzero(as_tuple=True)
        weights = logs[rows, which, None, :-1].softmax(-1)
        found = eye.describe(features[rows], around[rows], weights, eye.names(which[:, None])[:, :1])[2][:, 0]
        far = 1000 * (REACH * found - metres[rows, which]).norm(dim=-1)
        for row, thing, error in zip(rows.tolist(), which.tolist(), far.tolist(), strict=True):
            millimetres[f"{views[begin + row].name}, {things[thing].split()[-1]}"].append(error)
    return pixels, millimetres, missed


if __name__ == "__main__":
    tyro.cli(main)
