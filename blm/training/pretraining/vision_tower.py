"""Pretraining of nano's vision tower: localisation of named objects.

Larger vision towers are pretrained on other data. The labels are the "scan" turns of the corpus.
Some list all objects in a view: the heat map of each object is trained towards a distribution over
the cells of the image, or "nowhere". Views of fixed cameras also give positions in the robot's
frame. Each turn names its view; others name the current step. Shapes: N images, M objects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from blm.backbone import Backbone
from blm.backbone.grounding import REACH, GroundingConfig, GroundingTower
from blm.corpora import Conversation
from blm.corpora.scenes.questions import POINT_SCALE, read_scan
from blm.media import load_pixels
from blm.training.loop.batches import Microbatch
from blm.training.loop.distributed import DataShard
from blm.training.loop.loop import LoopConfig, run_loop
from blm.types import BlmError, Image

TARGET_STD = 0.5
"""Standard deviation of a target heat map around its point [cells]."""
METRIC_WEIGHT = 20.0
"""Weight of the position error [1/m]."""
METRIC_ROUNDING = 0.005
"""Position errors are smoothed below this [m]: labels are in whole centimetres."""


@dataclass(frozen=True)
class ScannedView:
    """One image with labels from scan turns."""

    image: Image
    root: Path
    positions: dict[str, tuple[int, ...]] | None
    """Object -> x, y [thousandths of the sides], then, if known, x, y, z from the robot [cm].

    None: not labelled.
    """
    step: str = ""
    """The current step of the task, if labelled."""
    name: str = ""
    """The camera, if labelled."""


def scanned_views(row: Conversation, root: Path) -> list[ScannedView]:
    """Return the labelled views of a conversation: its n-th scan turn is about its n-th image.

    A labelled step applies to all its images.
    """
    images = [image for message in row.messages for image in message.images]
    answers = [message.text for message in row.messages if message.role == "assistant"]
    scans = {kind: text for kind, text in zip(row.kinds, answers, strict=True) if kind.startswith("scan")}
    if step := scans.pop("scan_step", ""):
        return [ScannedView(image, root, None, step) for image in images]
    return [
        ScannedView(image, root, read_scan(text), name=kind.removeprefix("scan_"))
        for image, (kind, text) in zip(images, scans.items(), strict=False)
    ]


class Vocabulary(TypedDict):
    things: list[str]
    steps: list[str]
    views: list[str]


"""What a vision tower can be taught to find and to tell apart."""


def all_scanned_views(
    corpora: Sequence[tuple[Sequence[Conversation], Path]],
) -> tuple[list[ScannedView], Vocabulary]:
    """Return the labelled views of corpora (conversations, and the folder of their images), and the
    vocabulary of their labels."""
    views = [view for rows, root in corpora for row in rows for view in scanned_views(row, root)]
    things = sorted({name for view in views for name in view.positions or ()})
    steps, names = (sorted({getattr(view, kind) for view in views} - {""}) for kind in ("step", "name"))
    return views, {"things": things, "steps": steps, "views": names}


def pretrain_vision_tower(
    backbone: Backbone, views: Sequence[ScannedView], loop: LoopConfig, out: Path
) -> None:
    """Train the vision tower of a nano in place; its log is `out/log.jsonl`."""
    tower = backbone.model.base_model.vision_tower
    assert isinstance(tower, GroundingTower)
    all_targets = grounding_targets(views, tower.config)

    def next_batch(step: int, shard: DataShard) -> Microbatch[tuple[Tensor, GroundingTargets]]:
        drawn = np.random.default_rng((loop.seed, step)).integers(0, len(views), loop.batch_size)
        mine = shard.of(drawn.tolist())
        pictures = [load_pixels(views[row].image, views[row].root) for row in mine]
        inputs = backbone.processor.image_processor(pictures, return_tensors="pt")
        batch = inputs["pixel_values"], GroundingTargets(*(value[mine] for value in all_targets))
        return Microbatch(batch, mine, weight=len(mine))

    def loss(batch: tuple[Tensor, GroundingTargets]) -> tuple[Tensor, dict[str, Tensor | float]]:
        pixels, *targets = (value.to(tower.device, non_blocking=True) for value in (batch[0], *batch[1]))
        return vision_tower_loss(tower, pixels, GroundingTargets(*targets))

    tower.requires_grad_(True)
    tower.train()
    run_loop(tower, loss, next_batch, loop, out)
    tower.eval()


class GroundingTargets(NamedTuple):
    """Labels of N images. NaN, or -1 for a step or view: not labelled."""

    points: Tensor
    """[N, M, 2] x, y as fractions of the image; negative: the object is not in the image."""
    metres: Tensor
    """[N, M, 3] positions in the robot's frame [m]."""
    step: Tensor
    """[N] class of the current step."""
    view: Tensor
    """[N] class of the camera."""


def grounding_targets(views: Sequence[ScannedView], known: GroundingConfig) -> GroundingTargets:
    """Return the labels of views, in the vision tower's order of things, steps and cameras.

    Raises BlmError for names that the tower does not have.
    """
    things = known.things
    labels = {name for view in views for name in (*(view.positions or ()), view.step, view.name)} - {""}
    if unknown := sorted(labels - {*things, *known.steps, *known.views}):
        raise BlmError(
            f"the vision tower has no heat map or class for {', '.join(unknown)}: it was made for other "
            "corpora. Train a new backbone (--backbone nano), or drop these scenes"
        )
    points = torch.full((len(views), len(things), 2), -1.0)
    metres = torch.full((len(views), len(things), 3), torch.nan)
    for row, view in enumerate(views):
        if view.positions is None:
            points[row] = torch.nan
        for name, position in (view.positions or {}).items():
            points[row, things.index(name)] = torch.tensor(position[:2]) / POINT_SCALE
            if len(position) == 5:
                metres[row, things.index(name)] = torch.tensor(position[2:]) / 100
    steps = [known.steps.index(view.step) if view.step else -1 for view in views]
    names = [known.views.index(view.name) if view.name else -1 for view in views]
    return GroundingTargets(points, metres, torch.tensor(steps), torch.tensor(names))


def vision_tower_loss(
    tower: GroundingTower, pixels: Tensor, targets: GroundingTargets
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Return the mean loss over images [N, 3, 112, 112], and metrics.

    The metrics are those of localisation and classification. Metrics without labels in the batch
    are NaN: all processes of a run must report the same names.
    """
    points, metres, *_ = targets
    features, summary = tower.features(pixels)
    log_maps = tower.maps(features)[:, : points.shape[1]]
    labelled = ~points[:, 0, 0].isnan()
    # all processes must use all parameters in every step (DDP), whichever labels their images have
    unused = 0.0 * torch.stack([p.sum() for p in tower.parameters()]).sum()
    loss = unused - (target_heatmaps(points[labelled], tower.config.cells) * log_maps[labelled]).sum()
    metrics: dict[str, Tensor | float] = dict.fromkeys(("mm_off", "steps_right", "views_right"), math.nan)
    off = localisation_error(log_maps[labelled], points[labelled])
    metrics["pixels_off"] = tower.config.image_size * off
    rows, things = (~metres[..., 0].isnan()).nonzero(as_tuple=True)
    if len(rows):
        weights = log_maps[rows, things, None, :-1].softmax(-1)
        names = tower.names(things[:, None])[:, :1]
        _, _, positions = tower.describe(features[rows], summary[rows], weights, names)
        error = REACH * positions[:, 0] - metres[rows, things]
        loss = loss + METRIC_WEIGHT * (error.square() + METRIC_ROUNDING**2).sqrt().sum()
        metrics["mm_off"] = 1000 * error.detach().norm(dim=-1).median()
    if labelled.any():
        average = tower.average(features)[labelled]
        is_fixed = (~metres[labelled][..., 0].isnan()).any(-1, keepdim=True).to(average)
        loss = loss + F.binary_cross_entropy_with_logits(tower.fixed(average), is_fixed, reduction="sum")
    for name, head, label in (("steps", tower.doing, targets.step), ("views", tower.view, targets.view)):
        if (known := label >= 0).any():
            logits = head(summary[known])
            loss = loss + F.cross_entropy(logits, label[known], reduction="sum")
            metrics[f"{name}_right"] = (logits.argmax(-1) == label[known]).float().mean()
    return loss / len(pixels), metrics


def target_heatmaps(points: Tensor, side: int) -> Tensor:
    """Return distributions [N, M, P + 1] over cells and "nowhere" for points [N, M, 2].

    There are P = side x side cells. Negative points are absent.
    """
    present = points[..., :1] >= 0
    cells = (torch.arange(side, device=points.device) + 0.5) / side
    x, y = torch.exp(-(((points[..., None] - cells) * side / TARGET_STD) ** 2) / 2).unbind(-2)
    near = (y[..., :, None] * x[..., None, :]).flatten(-2)
    near = near / near.sum(-1, keepdim=True).clamp_min(1e-9) * present
    return torch.cat([near, (~present).to(near)], dim=-1)


@torch.no_grad()
def localisation_error(log_maps: Tensor, points: Tensor) -> Tensor:
    """Return the median distance of expected and true points of present objects, or NaN.

    It is a fraction of the side of the image.
    """
    distance = (expected_points(log_maps) - points).norm(dim=-1)[points[..., 0] >= 0]
    return distance.median() if len(distance) else torch.tensor(math.nan)


def expected_points(log_maps: Tensor) -> Tensor:
    """Return mean points [N, M, 2] (fractions) of log-probabilities [N, M, P + 1]."""
    side = math.isqrt(log_maps.shape[-1] - 1)
    cells = (torch.arange(side, device=log_maps.device) + 0.5) / side
    weights = log_maps[..., :-1].softmax(-1).unflatten(-1, (side, side))
    return torch.stack([(weights.sum(-2) * cells).sum(-1), (weights.sum(-1) * cells).sum(-1)], dim=-1)
