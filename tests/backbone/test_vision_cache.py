"""Pictures that were just seen are not seen again, and nothing else changes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from blm.backbone import Backbone
from blm.backbone.generation.generator import Generation
from blm.backbone.prompt import control_prompt, question_prompt
from blm.backbone.vision_cache import cache_vision_features
from blm.types import Sampling
from tests.support.backbones import MAKERS


class Counted:
    """How often a model really looked."""

    def __init__(self, backbone: Backbone) -> None:
        base = backbone.model.base_model
        see = base.get_image_features
        self.looks = 0

        def count(*given, **named):
            self.looks += 1
            return see(*given, **named)

        base.get_image_features = count


def pictures(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 256, (56, 56, 3), dtype=np.uint8) for name in ("base", "wrist")}


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_an_action_and_a_question_share_vision_features(name):
    plain, backbone = MAKERS[name](), MAKERS[name]()
    plain.model.load_state_dict(backbone.model.state_dict())
    counted = Counted(backbone)
    cache_vision_features(backbone, max_entries=2)
    for seed, looks in ((0, 1), (0, 1), (1, 2), (0, 2), (2, 3), (1, 4)):  # 1 was longest ago when 2 came
        seen = pictures(seed)
        prompt = control_prompt("push", "panda", seen)
        tapped = backbone.tap(backbone.encode([prompt]), 2)
        torch.testing.assert_close(tapped.hidden, plain.tap(plain.encode([prompt]), 2).hidden)
        question = [question_prompt("What is in the picture?", list(seen.values()))]
        assert backbone.answer_batch(question, max_tokens=4) == plain.answer_batch(question, max_tokens=4)
        assert counted.looks == looks


def test_a_changed_pixel_misses_the_vision_cache():
    backbone = next(iter(MAKERS.values()))()
    counted = Counted(backbone)
    cache_vision_features(backbone)
    seen = pictures(0)
    first = backbone.tap(backbone.encode([control_prompt("push", "panda", seen)]), 2).hidden
    seen["wrist"][5, 7] = 255 - seen["wrist"][5, 7]
    second = backbone.tap(backbone.encode([control_prompt("push", "panda", seen)]), 2).hidden
    assert counted.looks == 2 and not torch.equal(first, second)


def test_training_bypasses_the_vision_cache():
    backbone = next(iter(MAKERS.values()))()
    counted = Counted(backbone)
    cache_vision_features(backbone)
    inputs = backbone.encode([control_prompt("push", "panda", pictures(0))])
    backbone.model.train()
    for _ in range(2):
        backbone.model(**inputs).logits.sum().backward()
    assert counted.looks == 2


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_chunked_prefill_uses_the_vision_cache(name):
    backbone = MAKERS[name]()
    counted = Counted(backbone)
    cache_vision_features(backbone)
    seen = pictures(0)
    backbone.tap(backbone.encode([control_prompt("push", "panda", seen)]), 2)
    generation = Generation(backbone, piece_tokens=64)
    question = question_prompt("What is in the picture? " * 20, list(seen.values()))
    prefill = generation.begin(generation.prepare(question, [Sampling(max_tokens=1)]))
    pieces = 0
    while generation.advance(prefill) is None:
        pieces += 1
    assert pieces > 2 and counted.looks == 1


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_the_vision_cache_is_bounded_in_bytes(name):
    backbone = MAKERS[name]()
    counted = Counted(backbone)
    cache_vision_features(backbone, max_bytes=100)  # less than one look
    for _ in range(2):
        backbone.tap(backbone.encode([control_prompt("push", "panda", pictures(0))]), 2)
    assert counted.looks == 2


def test_the_vision_cache_is_thread_safe():
    backbone = next(iter(MAKERS.values()))()
    prompts = [backbone.encode([control_prompt("push", "panda", pictures(seed))]) for seed in range(6)]
    expected = [backbone.tap(inputs, 2).hidden for inputs in prompts]
    cache_vision_features(backbone, max_entries=2)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, wanted in zip(
                pool.map(lambda i: backbone.tap(i, 2).hidden, prompts), expected, strict=True
            ):
                torch.testing.assert_close(found, wanted)
