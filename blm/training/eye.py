"""nano's eye learns to find named things before Stage I, as the eye of any larger backbone was pretrained.

It learns from the corpus's own "scan" questions, which list all that a view shows: the map of each thing
becomes a distribution over the cells of the picture, and "nowhere" where it is not. Shapes: N pictures,
M things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blm.backbone import Backbone, build_nano
from blm.backbone.eye import CELLS, IMAGE_SIZE, ConvVision
from blm.corpora import Conversation
from blm.corpora.questions import POINT_SCALE, read_scan
from blm.media import load_pixels
from blm.training.loop import LoopConfig, Piece, run_loop
from blm.training.parallel import Part
from blm.training.sft import Stage1Config, TrainingSource, train_stage1
from blm.types import Image

EYE = LoopConfig(steps=1800, batch_size=32, lr=3e-3, clip=5.0, title="nano's eye")
DRILL = LoopConfig(steps=2000, batch_size=8, lr=1.5e-3, title="nano's drill")
SPREAD = 0.5
"""Standard deviation of a target around its point [cells]."""


@dataclass(frozen=True)
class View:
    """One picture, and where its things are."""

    image: Image
    root: Path
    points: dict[str, tuple[int, int]]
    """In thousandths of the picture's sides."""


@dataclass(frozen=True, kw_only=True)
class Schooling:
    """What a new nano learns before Stage I proper. Finding comes first: mixed with all other questions from
    the beginning it was not learnt within the runs in docs/LOG.md."""

    eye: LoopConfig = EYE
    """The eye alone."""
    drill: LoopConfig = DRILL
    """The language model: only the turns that say where things are."""


def taught_nano(
    corpora: Sequence[tuple[Sequence[Conversation], Path]], schooling: Schooling, out: Path, *, seed: int = 0
) -> Backbone:
    """Return a nano with a tokenizer of these corpora's texts, which finds the things that they scan.

    `corpora` are conversations and the folder of their pictures; without scans in them it stays untrained.
    Continues a killed schooling in `out`.
    """
    views = [view for rows, root in corpora for row in rows for view in scanned(row, root)]
    things = sorted({name for view in views for name in view.points})
    texts = (m.text for rows, _ in corpora for row in rows for m in row.messages)
    backbone = build_nano(texts, seed=seed, things=things)
    if views:
        teach_eye(backbone, views, schooling.eye, out / "eye")
        sources = [
            TrainingSource(name=root.name, conversations=drilled, root=root, weight=float(len(drilled)))
            for rows, root in corpora
            if (drilled := [row.select(turns).messages for row in rows if (turns := finding(row))])
        ]
        seen = schooling.drill.steps * schooling.drill.batch_size
        often = seen > sum(len(source.conversations) for source in sources)
        config = Stage1Config(loop=schooling.drill, vision_scale=0.0, cache_features=often)
        train_stage1(backbone, sources, config, out / "drill")
    return backbone


def finding(row: Conversation) -> list[int]:
    """The turns of a conversation that say where things are in a picture."""
    return [turn for turn, kind in enumerate(row.kinds) if kind.startswith(("scan", "point", "box"))]


def scanned(row: Conversation, root: Path) -> list[View]:
    """The views of a conversation that it scans: its n-th scan is about its n-th picture."""
    images = [image for message in row.messages for image in message.images]
    answers = [message.text for message in row.messages if message.role == "assistant"]
    scans = [text for kind, text in zip(row.kinds, answers, strict=True) if kind.startswith("scan")]
    return [View(image, root, read_scan(text)) for image, text in zip(images, scans, strict=False)]


def teach_eye(backbone: Backbone, views: Sequence[View], loop: LoopConfig, out: Path) -> None:
    """Train the eye of a nano in place; its log is `out/log.jsonl`."""
    eye = backbone.model.base_model.vision_tower
    assert isinstance(eye, ConvVision)
    names = list(eye.config.things)
    where = torch.full((len(views), len(names), 2), -1.0)
    for place, view in enumerate(views):
        for name, point in view.points.items():
            where[place, names.index(name)] = torch.tensor(point) / POINT_SCALE
    pictures = np.stack([load_pixels(view.image, view.root) for view in views])

    def next_batch(step: int, part: Part) -> Piece[tuple[Tensor, Tensor]]:
        drawn = np.random.default_rng((loop.seed, step)).integers(0, len(views), loop.batch_size)
        mine = part.of(drawn.tolist())
        inputs = backbone.processor.image_processor(list(pictures[mine]), return_tensors="pt")
        return Piece((inputs["pixel_values"], where[mine]), mine, weight=len(mine))

    def loss(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        pixels, points = (value.to(eye.device) for value in batch)
        logs = eye.maps(pixels)[1][:, : len(names)]
        error = -(target(points) * logs).sum(-1)
        return error.sum() / len(points), {"pixels_off": pixels_off(logs, points)}

    eye.train()
    run_loop(eye, loss, next_batch, loop, out)
    eye.eval()


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
    """Median distance of what is there from where its map points to [px]."""
    distance = (places(logs) - points).norm(dim=-1)[points[..., 0] >= 0]
    return IMAGE_SIZE * distance.median() if len(distance) else torch.zeros(())


def places(logs: Tensor) -> Tensor:
    """[N, M, P + 1] log-probabilities of cells and nowhere -> [N, M, 2] fractions, if anywhere."""
    cells = (torch.arange(CELLS, device=logs.device) + 0.5) / CELLS
    weights = logs[..., :-1].softmax(-1).unflatten(-1, (CELLS, CELLS))
    return torch.stack([(weights.sum(-2) * cells).sum(-1), (weights.sum(-1) * cells).sum(-1)], dim=-1)
