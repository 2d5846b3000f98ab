"""Picture processing by look-up is bit-equal to the processor of every family, or is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blm.backbone import Backbone, build_nano
from blm.backbone.pixel_map import find_pixel_map
from blm.backbone.prompt import question_prompt
from tests.support.families import FAMILIES

SIDES = {"Qwen2.5-VL": 56, "Qwen3-VL": 64, "nano": 112}
"""Side [px] of pictures that the tiny model does not resize; of other families: 32, of nano 112."""
RESIZED = ("SmolVLM2", "Idefics3, SmolVLM")
"""Families whose processors enlarge every picture, and then reduce it."""
MAPPED = {name: make for name, make in {**FAMILIES, "nano": build_nano}.items() if name not in RESIZED}


def process(backbone: Backbone, *pictures: np.ndarray) -> torch.Tensor:
    return backbone.read([question_prompt("", pictures)])["pixel_values"]


@pytest.mark.parametrize("family", list(MAPPED))
def test_a_map_gives_the_bits_of_the_processor(family: str) -> None:
    backbone, side = MAPPED[family](), SIDES.get(family, 32)
    found = find_pixel_map(lambda pictures: process(backbone, *pictures), side, side)
    assert found is not None
    pictures = np.random.default_rng(5).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    own = process(backbone, *pictures)
    assert torch.equal(found(torch.from_numpy(pictures)), own)
    half = found.to(torch.device("cpu"), torch.bfloat16)(torch.from_numpy(pictures))
    assert torch.equal(half, own.to(torch.bfloat16))
    wide = find_pixel_map(lambda pictures: process(backbone, *pictures), side + 12, side + 12)
    assert wide is None, "pictures of this size are resized"


@pytest.mark.parametrize("family", RESIZED)
def test_a_processor_that_resizes_has_no_map(family: str) -> None:
    backbone = FAMILIES[family]()
    assert find_pixel_map(lambda pictures: process(backbone, *pictures), 32, 32) is None


@pytest.mark.parametrize("change", ["blurred", "constant", "of their content"])
def test_what_is_no_map_is_refused(change: str) -> None:
    def other(pictures: object) -> torch.Tensor:
        values = torch.from_numpy(np.stack(pictures)).float()  # type: ignore[arg-type]
        if change == "blurred":
            return (values + values.roll(1, 1)) / 2
        if change == "constant":
            return values * 0
        return values if (values % 255 == 0).all() else values - values.mean((1, 2, 3), keepdim=True)

    assert find_pixel_map(other, 8, 8) is None
