"""The built-in nano backbone: its stock files, its tokenizer, what its pictures become."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from blm.backbone import Backbone, build_nano, question_prompt
from tests.support.backbones import picture


@pytest.fixture(scope="module")
def nano() -> Backbone:
    return build_nano()


def test_nano_loads_by_the_auto_classes_alone(nano: Backbone, tmp_path: Path) -> None:
    nano.save(tmp_path / "nano")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "nano")
    processor = AutoProcessor.from_pretrained(tmp_path / "nano")
    text = "<|user|><image>What is it?<|end|><|assistant|>"
    inputs = processor(text=[text], images=[PIL.Image.fromarray(picture(3))], return_tensors="pt")
    mine = nano.encode([question_prompt("What is it?", [picture(3)])])
    assert all(torch.equal(inputs[name], mine[name]) for name in mine)
    weights = nano.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with torch.no_grad():  # not to the bit: weights read from a file lie elsewhere in memory
        torch.testing.assert_close(model(**inputs).logits, nano.model(**mine).logits)
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 16
    assert 1.5e6 < sum(p.numel() for p in model.parameters()) < 3e6


def test_nano_is_a_function_of_its_seed() -> None:
    state = torch.get_rng_state()
    one, same, other = (build_nano(seed=seed).fingerprint() for seed in (0, 0, 1))
    assert one == same != other
    assert torch.equal(torch.get_rng_state(), state)


def test_the_tokenizer_round_trips_any_text_and_spells_numbers(nano: Backbone) -> None:
    tokenizer = nano.processor.tokenizer
    for text in ("(512, 430)", "Where is\n the cube?  Über 3½ λ — 火 \U0001f916", "1000,2 x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    text = "<think>now (1, 2)</think>yes"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    tokens = tokenizer.tokenize(text)
    assert tokens[0] == "<think>" and tokens.count("</think>") == 1 and len(tokenizer.encode("</think>")) == 1
    tokens = tokenizer.tokenize("(512, 430)")
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("512430")


def test_nano_distinguishes_positions(nano: Backbone) -> None:
    """The same patch at two places gives different tokens, and a small shift inside one cell shows too."""

    def shifted(x: int) -> np.ndarray:
        image = np.zeros((112, 112, 3), dtype=np.uint8)
        image[40:50, x : x + 10] = 255
        return image

    hidden = [
        nano.tap(nano.encode([question_prompt("", [shifted(x)])]), 1).hidden[0, 1:17] for x in (30, 31, 80)
    ]
    assert (hidden[0] - hidden[1]).abs().max() > 1e-3
    assert (hidden[0] - hidden[2]).abs().max() > 1e-2


def test_a_backbone_records_the_scenes_of_its_training(tmp_path: Path) -> None:
    fresh = build_nano()
    before = fresh.fingerprint()
    fresh.record_training(["unknown"])
    assert fresh.training == "unknown"
    fresh.record_training(["unknown", "plain"])
    assert fresh.training == "plain"
    fresh.save(tmp_path / "plain")
    later = Backbone.load(tmp_path / "plain")
    assert later.training == "plain" and later.fingerprint() == before
    later.record_training(["randomized"])
    later.record_training(["plain"])
    later.save(tmp_path / "randomized")
    assert Backbone.load(tmp_path / "randomized").training == "randomized"
