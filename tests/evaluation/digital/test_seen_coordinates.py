"""Pixels in an answer count in the picture as the model saw it, not as its file has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from blm.evaluation.digital import evaluate_digital
from blm.evaluation.digital.benchmarks.scene_questions import SCENE
from blm.evaluation.digital.runner import DigitalEvalConfig
from blm.evaluation.digital.scoring import qwen2_5_vl_size
from blm.types import BlmError, Image, Message, Question
from tests.support.backbones import MAKERS

LIMITS = {"shortest_edge": 3136, "longest_edge": 12845056}
"""As in the folder of Qwen2.5-VL-7B-Instruct on the hub."""


class Pointer:
    """A model that points to the middle of the lower right quarter, in pixels of what it sees."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)

    def seen_size(self, width: int, height: int) -> tuple[int, int]:
        return self.size if (width, height) != (64, 64) else (64, 64)

    def answer(self, messages: Sequence[Message], *, max_tokens: int = 128) -> str:
        width, height = self.size
        return f"({round(0.75 * width)}, {round(0.75 * height)})"


def question(width: int, height: int, scorer: str = "point") -> Question:
    mask = np.zeros((height, width, 3), np.uint8)
    mask[round(0.7 * height) : round(0.8 * height), round(0.7 * width) : round(0.8 * width)] = 255
    return Question(
        id="q",
        kind="point",
        messages=(Message("user", (Image(np.zeros((height, width, 3), np.uint8)), "Point at it.")),),
        answer="(750, 750)",
        group="q",
        scorer=scorer,  # type: ignore[arg-type]
        mask=Image(mask) if scorer == "points" else None,
    )


@pytest.mark.parametrize("scorer", ["point", "points"])
@pytest.mark.parametrize(
    ("coordinates", "right"), [("pixels", 1.0), ("pixels:original", 0.0), ("pixels:280x196", 1.0)]
)
def test_pixels_count_in_the_picture_that_the_model_saw(
    tmp_path: Path, scorer: str, coordinates: str, right: float
) -> None:
    """A picture of 640 x 480 was seen in 280 x 196: its pixels are off by 56 % in the original."""
    config = DigitalEvalConfig(coordinates=coordinates)
    asked = [question(640, 480, scorer)]
    result = evaluate_digital(Pointer(280, 196), asked, tmp_path, model="m", benchmark=SCENE, config=config)
    assert result.predictions[0].score == right


@pytest.mark.parametrize("size", [(640, 480), (97, 1203), (60, 61), (1920, 1080), (28, 28), (5000, 4000)])
def test_an_endpoint_of_qwen_is_read_with_its_published_limits(size: tuple[int, int], tmp_path: Path) -> None:
    width, height = size
    processor = Qwen2VLImageProcessorPil(size=LIMITS)
    blank = np.zeros((height, width, 3), np.uint8)
    _, rows, columns = processor(images=[blank], return_tensors="np")["image_grid_thw"][0].tolist()
    seen = (columns * processor.patch_size, rows * processor.patch_size)
    assert qwen2_5_vl_size(width, height) == seen
    config = DigitalEvalConfig(coordinates="pixels:qwen2_5_vl")
    chat = Pointer(*seen)
    result = evaluate_digital(chat, [question(*size)], tmp_path, model="m", benchmark=SCENE, config=config)
    assert result.predictions[0].score == 1


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_a_backbone_says_the_size_of_the_pictures_it_reads(name: str) -> None:
    backbone = MAKERS[name]()
    for width, height in ((90, 60), (64, 64), (300, 41)):
        pixels = np.zeros((height, width, 3), np.uint8)
        inputs = backbone.encode([(Message("user", (Image(pixels), "?")),)])
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        patch = backbone.processor.image_processor.patch_size
        assert backbone.seen_size(width, height) == (columns * patch, rows * patch)


def test_pixels_of_an_unknown_picture_are_refused(tmp_path: Path) -> None:
    class Plain:
        def answer(self, messages: Sequence[Message], *, max_tokens: int = 128) -> str:
            raise AssertionError("it must not be asked")

    config = DigitalEvalConfig(coordinates="pixels")
    for chat, message in (
        (Plain(), "pixels have no scale; give --coordinates pixels:qwen2_5_vl"),
        (MAKERS["smolvlm"](), r"family 'idefics3' do not count the pixels .*thousandths"),
    ):
        with pytest.raises(BlmError, match=message):
            evaluate_digital(chat, [question(64, 48)], tmp_path, model="m", benchmark=SCENE, config=config)
    assert not (tmp_path / "result.json").exists()
