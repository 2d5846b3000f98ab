"""Checks of a recipe against its backbone and corpora, before hours of work: without weights, in
seconds."""

from __future__ import annotations

from pathlib import Path

from blm.app.mixture import name_missing
from blm.app.recipe import Recipe, Stage1Settings
from blm.app.stage1 import NANO, TrainingCorpus, warn_of_lengths
from blm.backbone import Backbone
from blm.backbone.families import require_rendered_order
from blm.corpora.public import require_sound
from blm.training.pretraining.nano import is_nano
from blm.training.sft.train import choose_trained
from blm.types import BlmError


def check_stage1(recipe: Recipe, run: Path) -> None:
    """Raise BlmError if the backbone cannot be loaded, or not be trained as the recipe says.

    Name the corpora that are missing. Raises BlmError for one that is present but faulty, or whose
    first conversations are all too long to train on.
    """
    settings = recipe.stage1
    if settings.backbone != NANO:
        backbone = Backbone.outline(settings.backbone)
        choose_trained(backbone, settings.training, exact=False)
    if not settings.mixed:
        return
    if settings.backbone == NANO or is_nano(backbone):
        raise BlmError(
            "stage1.mixture and stage1.epochs are for backbones that already speak; a nano learns its "
            "language from the scene questions. Use `blm train stage1 --corpus ..` for other corpora"
        )
    check_mixture(backbone, settings)


def check_mixture(backbone: Backbone, settings: Stage1Settings) -> None:
    """Name missing corpora, and read the beginning of the others. Raises as `check_stage1` does."""
    name_missing(settings.mixture)
    present = [corpus for corpus in settings.mixture.placed if corpus.present]
    if not present and not settings.mixture.scenes:
        raise BlmError(
            "Stage I has nothing to train on: no scene questions, and all public corpora are missing"
        )
    for corpus in present:
        rows = require_sound(corpus)
        some = TrainingCorpus(name=corpus.name, folder=corpus.folder, conversations=rows)
        warn_of_lengths(backbone, some, settings.training)


def check_stage2(recipe: Recipe, run: Path) -> None:
    """Raise BlmError if the backbone has fewer blocks than the layer that the recipe reads, or cannot
    read the recipe's prompts."""
    trained = run / "stage1/backbone"
    backbone = Backbone.outline(trained if trained.is_dir() else recipe.stage1.backbone)
    layer = recipe.stage2.layer
    if layer > backbone.num_layers:
        raise BlmError(f"stage2.layer is {layer}, but the backbone has {backbone.num_layers} blocks")
    require_rendered_order(backbone.processor, backbone.model.config.model_type, recipe.prompt)
