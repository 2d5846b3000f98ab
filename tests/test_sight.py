"""Pictures that were just seen are not seen again, and nothing else changes."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

import numpy as np
import pytest
import torch
from test_backbone import MAKERS

from blm.backbone import Backbone
from blm.backbone.prompt import control_prompt, question_prompt
from blm.backbone.sight import remember_sight


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
def test_an_action_and_a_question_share_one_look(name):
    plain, backbone = MAKERS[name](), MAKERS[name]()
    plain.model.load_state_dict(backbone.model.state_dict())
    counted = Counted(backbone)
    remember_sight(backbone, most=2)
    for seed, looks in ((0, 1), (0, 1), (1, 2), (0, 2), (2, 3), (1, 4)):  # 1 was longest ago when 2 came
        seen = pictures(seed)
        prompt = control_prompt("push", "panda", seen)
        tapped = backbone.tap(backbone.encode([prompt]), 2)
        torch.testing.assert_close(tapped.hidden, plain.tap(plain.encode([prompt]), 2).hidden)
        question = [question_prompt("What is in the picture?", list(seen.values()))]
        assert backbone.answer_batch(question, max_tokens=4) == plain.answer_batch(question, max_tokens=4)
        assert counted.looks == looks


def test_one_pixel_is_enough_to_look_again():
    backbone = next(iter(MAKERS.values()))()
    counted = Counted(backbone)
    remember_sight(backbone)
    seen = pictures(0)
    first = backbone.tap(backbone.encode([control_prompt("push", "panda", seen)]), 2).hidden
    seen["wrist"][5, 7] = 255 - seen["wrist"][5, 7]
    second = backbone.tap(backbone.encode([control_prompt("push", "panda", seen)]), 2).hidden
    assert counted.looks == 2 and not torch.equal(first, second)


def test_training_looks_each_time():
    backbone = next(iter(MAKERS.values()))()
    counted = Counted(backbone)
    remember_sight(backbone)
    inputs = backbone.encode([control_prompt("push", "panda", pictures(0))])
    backbone.model.train()
    for _ in range(2):
        backbone.model(**inputs).logits.sum().backward()
    assert counted.looks == 2


class Slow(OrderedDict):
    """Lets other threads in before what is found is moved."""

    def move_to_end(self, key, last=True):
        time.sleep(1e-4)
        super().move_to_end(key, last)


def test_two_threads_may_look_at_once(monkeypatch):
    """An action and a chat come from two threads; what one drops, the other may be taking."""
    monkeypatch.setattr("blm.backbone.sight.OrderedDict", Slow)
    backbone = MAKERS["llava" if "llava" in MAKERS else sorted(MAKERS)[0]]()
    base = backbone.model.base_model
    base.get_image_features = lambda value: int(value[0])  # only the memory of it is tested
    remember_sight(backbone, most=1)
    backbone.model.eval()
    wrong: list[object] = []

    def look(offset: int) -> None:
        with torch.no_grad():
            for turn in range(300):
                asked = (turn + offset) % 3
                try:
                    if base.get_image_features(torch.tensor([asked])) != asked:
                        wrong.append(asked)
                except Exception as error:
                    wrong.append(error)

    threads = [threading.Thread(target=look, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
