"""nano's eye: what its tokens say, and that it learns to find things from scan turns."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from blm.backbone import build_nano
from blm.backbone.eye import CELLS, FOUND, NAME_SCALE, QUARTERS, WORDS, ConvVision, ConvVisionConfig
from blm.corpora.messages import Conversation
from blm.training.eye import Schooling, finding, places, scanned, target, taught_nano
from blm.training.loop import LoopConfig
from blm.types import BlmError, Image, Message

COLORS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (30, 60, 220)}


def scene(seed: int) -> Conversation:
    """Two squares of unlike colours on grey, with a scan turn and a question that is none."""
    rng = np.random.default_rng(seed)
    pixels = np.full((112, 112, 3), 128, np.uint8)
    names = [str(name) for name in rng.choice(sorted(COLORS), 2, replace=False)]
    spots = []
    for side, name in enumerate(names):  # one in each half, so that they do not overlap
        x, y = int(rng.integers(8, 48)) + 56 * side, int(rng.integers(8, 104))
        pixels[y - 5 : y + 5, x - 5 : x + 5] = COLORS[name]
        spots.append(f"{name} square ({round(x / 112 * 1000)}, {round(y / 112 * 1000)})")
    turns = (("List all in the base view.", ", ".join(sorted(spots))), ("Is it day?", "yes"))
    messages = []
    for index, (question, answer) in enumerate(turns):
        messages.append(Message("user", (*([Image(pixels)] if index == 0 else []), question)))
        messages.append(Message("assistant", (answer,)))
    return Conversation(
        id=f"s{seed}", group=f"s{seed}", source="t", kinds=("scan_base", "day"), messages=tuple(messages)
    )


def test_targets_are_distributions_with_their_mean_at_the_point():
    points = torch.tensor([[[0.5, 0.25], [-1.0, -1.0]]])
    made = target(points)
    assert torch.allclose(made.sum(-1), torch.ones(1, 2))
    assert made[0, 1, -1] == 1.0
    cells = (torch.arange(CELLS) + 0.5) / CELLS
    grid = made[0, 0, :-1].unflatten(0, (CELLS, CELLS))
    assert torch.isclose((grid.sum(0) * cells).sum(), torch.tensor(0.5), atol=1e-3)
    assert torch.isclose((grid.sum(1) * cells).sum(), torch.tensor(0.25), atol=1e-3)
    assert torch.allclose(places(made.clamp_min(1e-12).log())[0, 0], points[0, 0], atol=1e-3)


def test_scans_belong_to_their_pictures_and_drills_are_what_finds():
    row = scene(0)
    (view,) = scanned(row, Path())
    assert view.image is row.messages[0].images[0] and len(view.points) == 2
    assert finding(row) == [0]


def test_tokens_name_what_they_are_about():
    eye = ConvVision(ConvVisionConfig(things=["red cube", "red ball", "goal"]))
    with torch.no_grad():
        eye.nowhere.fill_(-1e4)  # everything is somewhere
        tokens = eye(torch.randn(2, 3, 112, 112)).last_hidden_state
    assert tokens.shape == (2, FOUND + QUARTERS, eye.config.hidden_size)
    names = tokens[0, :3, : len(eye.words)] / NAME_SCALE
    said = [{w for w, on in zip(eye.words, row, strict=True) if on > 0.5} for row in names]
    assert said == [{"red", "cube"}, {"red", "ball"}, {"goal"}]
    assert (tokens[0, FOUND:, WORDS : WORDS + QUARTERS] / NAME_SCALE).allclose(torch.eye(QUARTERS))


def test_too_many_words_are_refused():
    with pytest.raises(BlmError, match=f"at most {WORDS - FOUND} words"):
        ConvVisionConfig(things=[f"thing{index}" for index in range(WORDS)])


def test_an_untaught_eye_still_sees():
    backbone = build_nano()
    pictures = torch.stack([torch.zeros(3, 112, 112), torch.ones(3, 112, 112)])
    dark, light = backbone.model.base_model.vision_tower(pictures).last_hidden_state
    assert not torch.allclose(dark, light)


def test_schooling_finds_things_in_new_pictures(tmp_path):
    torch.set_num_threads(1)
    rows = [scene(seed) for seed in range(120)]
    schooling = Schooling(
        eye=LoopConfig(steps=120, batch_size=16, lr=3e-3, clip=5.0, save_every=1000),
        drill=LoopConfig(steps=2, batch_size=4),
    )
    backbone = taught_nano([(rows, tmp_path)], schooling, tmp_path / "run")
    eye = backbone.model.base_model.vision_tower
    assert eye.config.things == ["blue square", "green square", "red square"]
    errors = []
    for seed in range(1000, 1030):
        (view,) = scanned(scene(seed), tmp_path)
        inputs = backbone.processor.image_processor([view.image.pixels], return_tensors="pt")
        with torch.no_grad():
            found = places(eye.maps(inputs["pixel_values"])[1])[0]
        for name, (x, y) in view.points.items():
            u, v = found[eye.config.things.index(name)].tolist()
            errors.append(112 * math.hypot(u - x / 1000, v - y / 1000))
    assert np.median(errors) < 3.0  # px; chance is above 30
