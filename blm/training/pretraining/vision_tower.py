"""nano's eye learns to find named things before Stage I, as the eye of any larger backbone was pretrained.

It learns from the corpus's own "scan" turns. Some list all that a view shows: the map of each thing becomes a
distribution over the cells of the picture, and "nowhere" where it is not; views that do not move with the arm
also tell where things are from the robot. Each names its view; others name the step under way. Shapes: N
pictures, M things.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from blm.backbone import Backbone
from blm.backbone.nano.vision_tower import CELLS, IMAGE_SIZE, REACH, ConvVision, ConvVisionConfig
from blm.corpora import Conversation
from blm.corpora.scenes.questions import POINT_SCALE, read_scan
from blm.media import load_pixels
from blm.training.loop.distributed import Part
from blm.training.loop.loop import LoopConfig, Piece, run_loop
from blm.types import Image

SPREAD = 0.5
"""Standard deviation of a target around its point [cells]."""
METRIC_WEIGHT, MILLIMETRES = 20.0, 0.005
"""Loss per metre of error in a place from the robot, rounded below the second [m]: corpora tell whole cm."""


@dataclass(frozen=True)
class View:
    """One picture, and where its things are."""

    image: Image
    root: Path
    places: dict[str, tuple[int, ...]] | None
    """Where: thousandths of the picture's sides, and where it is known cm from the robot. None: not told."""
    step: str = ""
    """Which step is under way, if told."""
    name: str = ""
    """Which camera took it, if told."""


def scanned(row: Conversation, root: Path) -> list[View]:
    """The views of a conversation that it scans: its n-th scan is about its n-th picture.

    A named step is that of all its pictures.
    """
    images = [image for message in row.messages for image in message.images]
    answers = [message.text for message in row.messages if message.role == "assistant"]
    told = {kind: text for kind, text in zip(row.kinds, answers, strict=True) if kind.startswith("scan")}
    if step := told.pop("scan_step", ""):
        return [View(image, root, None, step) for image in images]
    return [
        View(image, root, read_scan(text), name=kind.removeprefix("scan_"))
        for image, (kind, text) in zip(images, told.items(), strict=False)
    ]


def teach_eye(backbone: Backbone, views: Sequence[View], loop: LoopConfig, out: Path) -> None:
    """Train the eye of a nano in place; its log is `out/log.jsonl`."""
    eye = backbone.model.base_model.vision_tower
    assert isinstance(eye, ConvVision) and isinstance(eye.config, ConvVisionConfig)
    lessons = lessons_of(views, eye.config)

    def next_batch(step: int, part: Part) -> Piece[tuple[Tensor, Lessons]]:
        drawn = np.random.default_rng((loop.seed, step)).integers(0, len(views), loop.batch_size)
        mine = part.of(drawn.tolist())
        pictures = [load_pixels(views[row].image, views[row].root) for row in mine]
        inputs = backbone.processor.image_processor(pictures, return_tensors="pt")
        batch = inputs["pixel_values"], Lessons(*(value[mine] for value in lessons))
        return Piece(batch, mine, weight=len(mine))

    def loss(batch: tuple[Tensor, Lessons]) -> tuple[Tensor, dict[str, Tensor | float]]:
        pixels, *lessons = (value.to(eye.device, non_blocking=True) for value in (batch[0], *batch[1]))
        return eye_loss(eye, pixels, Lessons(*lessons))

    eye.train()
    run_loop(eye, loss, next_batch, loop, out)
    eye.eval()


class Lessons(NamedTuple):
    """What N pictures show. Not-a-number, or -1 for a step or view: not told."""

    points: Tensor
    """[N, M, 2] fractions of the picture; negative: the thing is not there."""
    metres: Tensor
    """[N, M, 3] places from the robot [m]."""
    step: Tensor
    """[N]."""
    view: Tensor
    """[N]."""


def lessons_of(views: Sequence[View], known: ConvVisionConfig) -> Lessons:
    """Return what views show, in the eye's order of things, steps and cameras."""
    things, points = known.things, torch.full((len(views), len(known.things), 2), -1.0)
    metres = torch.full((*points.shape[:2], 3), torch.nan)
    for row, view in enumerate(views):
        if view.places is None:
            points[row] = torch.nan
        for name, place in (view.places or {}).items():
            points[row, things.index(name)] = torch.tensor(place[:2]) / POINT_SCALE
            if len(place) == 5:
                metres[row, things.index(name)] = torch.tensor(place[2:]) / 100
    steps = [known.steps.index(view.step) if view.step else -1 for view in views]
    names = [known.views.index(view.name) if view.name else -1 for view in views]
    return Lessons(points, metres, torch.tensor(steps), torch.tensor(names))


def eye_loss(eye: ConvVision, pixels: Tensor, lessons: Lessons) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Mean loss over N pictures [N, 3, 112, 112], and how far off the eye is in them.

    Not-a-number where they tell nothing about it: all processes of a training must name the same metrics.
    """
    points, metres, *_ = lessons
    features, summary = eye.features(pixels)
    logs = eye.maps(features)[:, : points.shape[1]]
    told = ~points[:, 0, 0].isnan()
    error = -(target(points[told]) * logs[told]).sum()
    log: dict[str, Tensor | float] = dict.fromkeys(("mm_off", "steps_right", "views_right"), math.nan)
    log["pixels_off"] = pixels_off(logs[told], points[told])
    rows, things = (~metres[..., 0].isnan()).nonzero(as_tuple=True)
    if len(rows):
        weights, names = logs[rows, things, None, :-1].softmax(-1), eye.names(things[:, None])[:, :1]
        _, _, found = eye.looks(features[rows], summary[rows], weights, names)
        off = REACH * found[:, 0] - metres[rows, things]
        error = error + METRIC_WEIGHT * (off.square() + MILLIMETRES**2).sqrt().sum()
        log["mm_off"] = 1000 * off.detach().norm(dim=-1).median()
    if told.any():
        whole = eye.whole(features)[told]
        fixed = (~metres[told][..., 0].isnan()).any(-1, keepdim=True).to(whole)
        error = error + F.binary_cross_entropy_with_logits(eye.fixed(whole), fixed, reduction="sum")
    for name, head, label in (("steps", eye.doing, lessons.step), ("views", eye.view, lessons.view)):
        if (told := label >= 0).any():
            guess = head(summary[told])
            error = error + F.cross_entropy(guess, label[told], reduction="sum")
            log[f"{name}_right"] = (guess.argmax(-1) == label[told]).float().mean()
    return error / len(pixels), log


def target(points: Tensor) -> Tensor:
    """[N, M, 2] fractions, negative for what is not there -> [N, M, P + 1] distributions."""
    there = points[..., :1] >= 0
    cells = (torch.arange(CELLS, device=points.device) + 0.5) / CELLS
    x, y = torch.exp(-(((points[..., None] - cells) * CELLS / SPREAD) ** 2) / 2).unbind(-2)
    near = (y[..., :, None] * x[..., None, :]).flatten(-2)
    near = near / near.sum(-1, keepdim=True).clamp_min(1e-9) * there
    return torch.cat([near, (~there).to(near)], dim=-1)


@torch.no_grad()
def pixels_off(logs: Tensor, points: Tensor) -> Tensor:
    """Median distance of what is there from where its map points to [px]; of nothing it is not a number."""
    distance = (places(logs) - points).norm(dim=-1)[points[..., 0] >= 0]
    return IMAGE_SIZE * distance.median() if len(distance) else torch.tensor(math.nan)


def places(logs: Tensor) -> Tensor:
    """[N, M, P + 1] log-probabilities of cells and nowhere -> [N, M, 2] fractions, if anywhere."""
    cells = (torch.arange(CELLS, device=logs.device) + 0.5) / CELLS
    weights = logs[..., :-1].softmax(-1).unflatten(-1, (CELLS, CELLS))
    return torch.stack([(weights.sum(-2) * cells).sum(-1), (weights.sum(-1) * cells).sum(-1)], dim=-1)
