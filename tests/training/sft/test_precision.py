"""Frozen weights in bfloat16 beside trained ones in float32, and the precision of saved folders."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blm.app import export
from blm.app.stage1 import load_pretrained
from blm.backbone import Backbone
from blm.backbone.precision import is_mixed, mixed_precision
from blm.io import read_json_lines
from blm.training.loop.loop import LoopConfig
from blm.training.sft.lora import Lora
from blm.training.sft.parameter_groups import part_of
from blm.training.sft.train import Stage1Config, TrainingSource, train_stage1
from blm.types import Image, Message
from tests.support.backbones import MAKERS, picture

LOOP = LoopConfig(steps=3, batch_size=2, lr=1e-3, log_every=1)
FULL = Stage1Config(loop=LOOP, vision_scale=0.0)
WITH_LORA = Stage1Config(loop=LOOP, lora=Lora(rank=2), projector_scale=0.0)


@pytest.fixture(scope="module", params=["qwen2.5", "smolvlm"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bfloat16 weights."""
    backbone = MAKERS[request.param]()
    backbone.model.to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("base") / "base"
    backbone.save(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def state(folder: Path) -> dict[str, torch.Tensor]:
    """The parameters under their names in the model, which differ from those in a file of Qwen."""
    return dict(Backbone.load(folder, dtype=torch.bfloat16).model.named_parameters())


def sources(backbone: Backbone) -> list[TrainingSource]:
    seen = (Message("user", (Image(picture(0, 56, 56)), "How many?")), Message("assistant", ("two",)))
    said = (Message("user", ("Who are you?",)), Message("assistant", ("a robot",)))
    return [TrainingSource(name="made", conversations=[seen, said])]


def trained(base: Path, config: Stage1Config, out: Path, dtype: Any) -> tuple[Backbone, list[float]]:
    backbone = load_pretrained(str(base), config, dtype=dtype)
    assert backbone is not None
    with warnings.catch_warnings(action="ignore"):  # of peft
        train_stage1(backbone, sources(backbone), config, out)
    return backbone, [row["loss"] for row in read_json_lines(out / "log.jsonl")]


def test_trained_parts_are_loaded_in_float32_and_the_others_in_bfloat16(base: Path) -> None:
    for config, parts in ((FULL, {"projector", "language"}), (WITH_LORA, set())):
        backbone = load_pretrained(str(base), config, dtype="bfloat16")
        assert backbone is not None
        for name, parameter in backbone.model.named_parameters():
            assert (parameter.dtype == torch.float32) == (part_of(name) in parts), name
        buffers = [b for n, b in backbone.model.named_buffers() if n.endswith("inv_freq")]
        assert buffers and all(buffer.dtype == torch.float32 for buffer in buffers)
        assert is_mixed(backbone.model) == bool(parts)
        talk = [Message("user", ("Hello",))]
        with mixed_precision(backbone.model), torch.no_grad():
            assert backbone.model(**backbone.encode([talk])).logits.isfinite().all()


@pytest.mark.parametrize(
    "config",
    [
        FULL,
        replace(FULL, cache_features=True, pack_length=128),
        replace(WITH_LORA, cache_features=True, checkpoint_blocks=True),
    ],
    ids=["full", "cached", "LoRA"],
)
def test_training_beside_bfloat16_weights_follows_float32(
    base: Path, config: Stage1Config, tmp_path: Path
) -> None:
    _, exact = trained(base, config, tmp_path / "float32", "float32")
    backbone, losses = trained(base, config, tmp_path / "bfloat16", "bfloat16")
    assert losses == pytest.approx(exact, rel=0.03) and losses[0] != exact[0]
    assert losses[-1] < losses[0]
    assert {value.dtype for value in weights(tmp_path / "bfloat16/backbone").values()} == {torch.bfloat16}
    before, after = (state(folder) for folder in (base, tmp_path / "bfloat16/backbone"))
    moved = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert moved == ({"projector", "language"} if config.lora.rank == 0 else {"language"})
    assert not is_mixed(backbone.model) and backbone.model.dtype == torch.bfloat16


def test_adapters_are_added_in_float32_then_rounded(base: Path, tmp_path: Path) -> None:
    config = replace(WITH_LORA, loop=replace(LOOP, lr=1e-2))
    trained(base, config, tmp_path, "bfloat16")
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert adapter and {value.dtype for value in adapter.values()} == {torch.float32}
    before, after = state(base), state(tmp_path / "backbone")
    for name in [name for name in adapter if "lora_A" in name]:
        a, b = adapter[name], adapter[name.replace("lora_A", "lora_B")]
        key = name.removeprefix("base_model.model.").replace(".lora_A", "")
        assert torch.equal(after[key], (before[key].float() + 2 * (b @ a)).to(torch.bfloat16)), key


def test_a_folder_keeps_its_precision_when_it_is_loaded_in_float32(base: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(base)
    assert backbone.model.dtype == torch.float32
    backbone.save(tmp_path / "same")
    before, after = weights(base), weights(tmp_path / "same")
    assert before.keys() == after.keys()
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, after[n]) for n, value in before.items())
    assert json.loads((tmp_path / "same/config.json").read_text())["dtype"] == "bfloat16"
    name, parameter = next(iter(backbone.model.named_parameters()))
    parameter.data += 1e-5
    backbone.save(tmp_path / "changed")
    changed = weights(tmp_path / "changed")
    widened = [key for key, value in changed.items() if value.dtype == torch.float32]
    assert len(widened) == 1
    again = Backbone.load(tmp_path / "changed")
    assert again.fingerprint() == backbone.fingerprint()
    assert torch.equal(dict(again.model.named_parameters())[name], parameter)


def test_an_export_keeps_bfloat16(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_verify", lambda backbone, folder: None)
    export.export_vllm(str(base), tmp_path / "out")
    before, after = weights(base), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, after[n]) for n, value in before.items())
