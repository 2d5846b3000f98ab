"""Checks of a recipe against its backbone, before hours of work: without weights, in seconds."""

from __future__ import annotations

from pathlib import Path

from blm.app.recipe import Recipe
from blm.app.stage1 import NANO
from blm.backbone import Backbone
from blm.training.sft.train import choose_trained
from blm.types import BlmError


def check_stage1(recipe: Recipe, run: Path) -> None:
    """Raise BlmError if the backbone cannot be loaded, or not be trained as the recipe says."""
    settings = recipe.stage1
    if settings.backbone != NANO:
        choose_trained(Backbone.outline(settings.backbone), settings.training, exact=False)


def check_stage2(recipe: Recipe, run: Path) -> None:
    """Raise BlmError if the backbone has fewer blocks than the layer that the recipe reads."""
    trained = run / "stage1/backbone"
    backbone = Backbone.outline(trained if trained.is_dir() else recipe.stage1.backbone)
    layer = recipe.stage2.layer
    if layer > backbone.num_layers:
        raise BlmError(f"stage2.layer is {layer}, but the backbone has {backbone.num_layers} blocks")
