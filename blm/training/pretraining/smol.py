"""Pretraining of smol before Stage I: its vision tower learns to localise things.

Its language model and the network that reads images are pretrained; the heads that localise things
are not (`blm.backbone.smol`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blm.backbone import Backbone, build_smol
from blm.backbone.smol.vision_tower import SceneVision
from blm.corpora import Conversation
from blm.training.loop.loop import LoopConfig
from blm.training.pretraining.vision_tower import all_scanned_views, pretrain_vision_tower


def is_untaught(backbone: Backbone) -> bool:
    """Return whether a backbone is a smol whose vision tower has no names for things yet."""
    tower = getattr(backbone.model.base_model, "vision_tower", None)
    return isinstance(tower, SceneVision) and not tower.config.things


def pretrain_smol(
    backbone: Backbone,
    corpora: Sequence[tuple[Sequence[Conversation], Path]],
    loop: LoopConfig,
    out: Path,
    *,
    seed: int = 0,
) -> None:
    """Teach an untaught smol, in place, to localise what the scan turns of these corpora label.

    `corpora` are conversations and the folder of their images. Without scan turns, the backbone
    stays as it is. Resumes a killed run in `out`.
    """
    views, vocabulary = all_scanned_views(corpora)
    if views:
        side = backbone.model.config.vision_config.image_size
        backbone.model = build_smol(image_size=side, seed=seed, **vocabulary).model
        pretrain_vision_tower(backbone, views, loop, out / "eye")
