"""Pooling of picture tokens, against an obvious version, for each family whose tokens form a grid."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blm.backbone import Backbone, build_nano, control_prompt
from blm.backbone.pooling import make_pooling, picture_grids, pooled_count, tap_pooled
from blm.types import BlmError
from tests.support.backbones import picture, tiny_smolvlm
from tests.support.families import FAMILIES
from tests.support.smol import tiny_smol

NO_GRID = "LLaVA-OneVision"
"""It puts a row break behind each picture."""
GRIDS: dict[str, Callable[[], Backbone]] = {
    **{family: make for family, make in FAMILIES.items() if family != NO_GRID},
    "smolvlm": lambda: tiny_smolvlm("smolvlm"),
}


def prompts(side: int = 56) -> list:
    views = {name: picture(n, side, side) for n, name in enumerate(("base", "wrist"))}
    return [control_prompt(text, "arm", views) for text in ("go", "reach the bright dot now")]


def slow_pooling(backbone: Backbone, inputs: dict[str, Tensor], hidden: Tensor, pool: int) -> list[Tensor]:
    """Each prompt's pooled states, token by token."""
    grids, rows = iter(picture_grids(backbone, inputs)), []
    for ids, mask, states in zip(inputs["input_ids"], inputs["attention_mask"], hidden, strict=True):
        row, place = [], 0
        while place < int(mask.sum()):
            if ids[place] != backbone.placeholder_id:
                row.append(states[place])
                place += 1
                continue
            height, width = next(grids)
            grid = states[place : place + height * width].view(height, width, -1)
            for top in range(0, height, pool):
                for left in range(0, width, pool):
                    row.append(grid[top : top + pool, left : left + pool].flatten(0, 1).mean(0))
            place += height * width
        rows.append(torch.stack(row))
    return rows


@pytest.mark.parametrize("family", GRIDS)
def test_pooled_states_are_means_of_the_grids(family: str) -> None:
    backbone = GRIDS[family]()
    inputs = backbone.read(prompts(), side="right")
    whole = backbone.tap(backbone.place(inputs), 1)
    for pool in (2, 3):
        found = tap_pooled(backbone, backbone.read(prompts(), side="right"), 1, pool)
        for row, (wanted, states) in enumerate(
            zip(slow_pooling(backbone, inputs, whole.hidden, pool), found.hidden, strict=True)
        ):
            length = int(found.mask[row].sum())
            torch.testing.assert_close(states[:length], wanted)
            assert found.mask[row, :length].all() and length == len(wanted)
            saved = sum(h * w - pooled_count(h, w, pool) for h, w in picture_grids(backbone, inputs)[:2])
            assert length == int(whole.mask[row].sum()) - saved and saved > 0
    same = tap_pooled(backbone, backbone.read(prompts(), side="right"), 1, 1)
    assert torch.equal(same.hidden, whole.hidden) and torch.equal(same.mask, whole.mask)


def test_a_picture_with_a_row_break_is_refused_by_name() -> None:
    backbone = FAMILIES[NO_GRID]()
    with pytest.raises(BlmError, match="34 tokens of 2 pictures, which are no squares; use pool 1"):
        tap_pooled(backbone, backbone.read(prompts()[:1], side="right"), 1, 2)


def test_text_tokens_stay_bit_for_bit() -> None:
    backbone = tiny_smolvlm("smolvlm")
    inputs = backbone.read(prompts(), side="right")
    hidden = torch.randn(*inputs["input_ids"].shape, 8)
    found = make_pooling(backbone, inputs, 2)(hidden)
    for ids, mask, states, pooled, real in zip(
        inputs["input_ids"], inputs["attention_mask"].bool(), hidden, found.hidden, found.mask, strict=True
    ):
        text = int(((ids != backbone.placeholder_id) & mask).sum())
        last = ids[mask] == backbone.placeholder_id
        after = int(last.flip(0).long().argmax())  # text tokens after the last picture
        assert 0 < after <= text
        assert torch.equal(pooled[real][-after:], states[mask][-after:])


def test_a_tower_without_a_grid_is_refused_by_name() -> None:
    with pytest.raises(
        BlmError, match=r"'blm_conv_vision' cannot be pooled.*things that it found.*use pool 1"
    ):
        nano = build_nano()
        tap_pooled(nano, nano.read(prompts(), side="right"), 1, 2)
    with pytest.raises(BlmError, match=r"'blm_scene_vision' cannot be pooled.*words and digits"):
        smol = tiny_smol()
        tap_pooled(smol, smol.read(prompts(), side="right"), 1, 2)
    backbone = tiny_smolvlm("smolvlm")
    inputs = backbone.read(prompts(), side="right")
    inputs["input_ids"][inputs["input_ids"].eq(backbone.placeholder_id).nonzero()[0].unbind()] = 0
    with pytest.raises(BlmError, match="15 tokens of 4 pictures, which are no squares"):
        picture_grids(backbone, inputs)
