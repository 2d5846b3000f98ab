"""LoRA over 4-bit weights: less memory, the merged model computes what was trained, clear refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blm.backbone import Backbone, four_bit
from blm.backbone.four_bit import dequantized, is_quantized, quantize, restore
from blm.training.loop.loop import LoopConfig
from blm.training.sft.lora import Lora, add_adapters, merge_adapters
from blm.training.sft.tokenize_corpora import TrainingSource
from blm.training.sft.train import Stage1Config, train_stage1
from blm.types import BlmError, Image, Message
from tests.support.backbones import picture, tiny_qwen

CONFIG = Stage1Config(loop=LoopConfig(steps=3, batch_size=2, lr=1e-2), lora=Lora(rank=2, four_bit=True))
TALK = (Message("user", (Image(picture(1, 56, 56)), "What is it?")), Message("assistant", ("a ramp",)))


def test_the_missing_package_and_device_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bit, "find_spec", lambda name: None)
    with pytest.raises(
        BlmError, match=r"bitsandbytes, which is not installed: pip install 'blm\[four-bit\]'"
    ):
        add_adapters(tiny_qwen("2.5"), CONFIG.lora, projector=False, seed=0)

    def refuse(*_: object) -> torch.nn.Module:
        raise NotImplementedError("no kernel for this device\nmore")

    monkeypatch.setattr(four_bit, "find_spec", lambda name: name)
    monkeypatch.setattr(four_bit, "_quantized", refuse)
    with pytest.raises(BlmError, match=r"on the device 'cpu': no kernel for this device"):
        four_bit.require_four_bit("cpu")


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(BlmError, match=r"give lora.rank"):
        Lora(four_bit=True)
    with pytest.raises(BlmError, match="cannot be sharded"):
        replace(CONFIG, loop=replace(CONFIG.loop, shard=True))


def test_a_restored_model_computes_what_the_quantized_one_does() -> None:
    pytest.importorskip("bitsandbytes")
    qwen = tiny_qwen("2.5")
    inputs = qwen.encode([TALK[:1]])
    linear = [part for part in qwen.decoder.modules() if isinstance(part, torch.nn.Linear)]
    size = sum(part.weight.nbytes for part in linear)
    assert quantize(qwen) == len(linear)
    parts = [part for part in qwen.decoder.modules() if is_quantized(part)]
    assert sum(part.weight.nbytes for part in parts) * 7 < size, "4 of 32 bits, padded"
    quantized = qwen.model(**inputs).logits
    assert dequantized(parts[0]).weight.shape == linear[0].weight.shape
    restore(qwen)
    assert torch.allclose(qwen.model(**inputs).logits, quantized, atol=1e-4)


def test_the_saved_backbone_is_the_trained_one(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    qwen = tiny_qwen("2.5")
    inputs = qwen.encode([TALK[:1]])
    adapted = add_adapters(qwen, CONFIG.lora, projector=True, seed=0)
    for name, parameter in qwen.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    trained = qwen.model(**inputs).logits
    merge_adapters(qwen, adapted, tmp_path / "adapter")
    assert torch.allclose(qwen.model(**inputs).logits, trained, atol=1e-4)
    other = tiny_qwen("2.5")
    train_stage1(other, [TrainingSource(name="made", conversations=[TALK])], CONFIG, tmp_path)
    again = Backbone.load(tmp_path / "backbone")
    assert torch.allclose(again.model(**inputs).logits, other.model(**inputs).logits, atol=1e-5)
    assert not any(is_quantized(part) for part in other.model.modules())
