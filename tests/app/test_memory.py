"""Memory of recipes: estimates from models without values, against what torch allocates for real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.measured_memory import STAGE1, acting_memory, small_qwen, stage1_memory, stage2_memory
from blm.app.memory.estimate import MemoryEstimate, estimate_memory
from blm.app.memory.outline import Outline, count_parameters, outline_backbone
from blm.app.memory.table import describe
from blm.app.memory.tracking import TensorMemory, empty, strip_values
from blm.app.memory.work import (
    tap,
)
from blm.app.recipes import RECIPES
from blm.backbone import Backbone
from blm.backbone.pooling import tap_pooled
from blm.backbone.published_shapes import shape_of
from blm.policy.network import PolicyNetwork
from blm.training.sft.lora import Lora
from blm.types import BlmError, UnknownNameError

WITHIN = 0.1
"""Largest relative difference of estimate and measurement."""
QUICK = "LoRA"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != QUICK)) for name in STAGE1]
)
def test_stage_one_takes_the_estimated_memory(name: str, tmp_path: Path) -> None:
    assert abs(stage1_memory(name, tmp_path).difference) < WITHIN


def test_stage_two_from_the_cache_takes_the_estimated_memory(tmp_path: Path) -> None:
    assert abs(stage2_memory(tmp_path).difference) < WITHIN


def test_acting_and_cache_filling_take_the_estimated_memory() -> None:
    for name, found in acting_memory().items():
        assert abs(found.difference) < WITHIN, name


def test_tensors_without_values_count_as_real_ones() -> None:
    def work(make: Callable[..., torch.Tensor]) -> tuple[int, int]:
        with TensorMemory() as memory:
            x = make(8, 16)
            memory.add([x])
            y = (x @ x.T).relu()
            z = y.view(-1)[3:]  # shares the memory of y
            del y, z
            return memory.live, memory.peak

    assert work(empty) == work(lambda *shape: torch.zeros(shape)) == (512, 512 + 2 * 256)


@pytest.fixture(scope="module")
def nano() -> MemoryEstimate:
    return estimate_memory(RECIPES["nano"]())


def test_the_sizes_are_those_of_real_models(nano: MemoryEstimate) -> None:
    recipe, backbone = RECIPES["nano"](), Backbone.load("nano")
    assert nano.backbone == count_parameters(backbone.model) and nano.hidden == backbone.hidden_size
    policy = PolicyNetwork(recipe.stage2.policy, backbone.hidden_size, 4)
    assert nano.policy == count_parameters(policy)
    last = count_parameters(backbone.decoder.layers[3])
    assert nano.tapped == nano.backbone - last, "words and head are one matrix"
    cached = nano.stage("Stage II, cached")
    assert cached.device["trained"] == cached.device["average"] == 4 * nano.policy
    assert cached.device["gradients"] == 4 * nano.policy
    with pytest.raises(BlmError, match="processes is 0"):
        estimate_memory(recipe, processes=0)
    assert nano.stage("hidden-state cache").device["backbone"] == pytest.approx(4 * nano.tapped, rel=0.01)
    assert cached.host["checkpoint copy"] == sum(cached.device[n] for n in ("trained", "moments", "average"))
    text = describe(nano, "cpu")
    assert "2.5 M parameters" in text and "each process" in text and "Stage II, live" in text


@pytest.mark.parametrize(
    ("name", "parameters"), [("qwen2_5_vl_3b", 3_754_622_976), ("qwen2_5_vl_7b", 8_292_166_656)]
)
def test_shapes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    """Half of "total_size" in model.safetensors.index.json of Qwen/Qwen2.5-VL-{3B,7B}-Instruct (bfloat16)."""
    backbone = outline_backbone(name)
    assert count_parameters(backbone.model) == parameters
    assert not torch.cuda.is_initialized() or torch.cuda.memory_allocated() == 0
    with pytest.raises(UnknownNameError, match="qwen2_5_vl_7b"):
        shape_of("qwen2_5_vl_72b")


def test_frozen_weights_of_stage_one_are_bfloat16_on_cuda() -> None:
    base = RECIPES["smol"]()
    training = replace(base.stage1.training, lora=Lora(rank=4), cache_features=False)
    recipe = replace(base, device="cuda", stage1=replace(base.stage1, backbone="blm-nano", training=training))
    backbone = Outline(recipe, 1).stage1_backbone()
    for name, parameter in backbone.model.named_parameters():
        wanted = torch.float32 if parameter.requires_grad or "original_module" in name else torch.bfloat16
        assert parameter.dtype is wanted, name


@pytest.mark.parametrize("pool", [1, 2])
def test_a_compact_cache_has_the_bytes_of_its_codes(pool: int) -> None:
    backbone = Backbone(strip_values(small_qwen("meta").model), small_qwen("meta").processor)
    base = RECIPES["nano"]()
    recipe = replace(base, stage2=replace(base.stage2, pool=pool, precision="compact", dims=64))
    outline = Outline(recipe, 1)
    inputs = outline.prompts(backbone, 1)
    tapped = tap_pooled(backbone, inputs, 2, pool)
    assert outline.pooled_tokens(backbone) == tapped.mask.sum()
    assert tap(backbone, inputs, 2, pool) > 0


@pytest.mark.slow
def test_several_processes_share_the_states(nano: MemoryEstimate) -> None:
    base = RECIPES["nano"]()
    loop = replace(base.stage1.training.loop, muon=0.0)
    recipe = replace(base, stage1=replace(base.stage1, training=replace(base.stage1.training, loop=loop)))
    alone, copied, sharded = (
        estimate_memory(recipe, processes=count, shard=shard).stage("Stage I").device
        for count, shard in ((1, False), (4, False), (4, True))
    )
    assert copied["moments"] == alone["moments"] and sharded["moments"] == -(-alone["moments"] // 4)
    assert copied["gradient buckets"] == alone["gradients"]
    assert copied["activations"] < 0.4 * alone["activations"], "each process has a quarter of the batch"


@pytest.mark.slow
def test_the_paper_s_scale_is_estimated_without_its_memory() -> None:
    recipe = replace(RECIPES["qwen2_5_vl_7b"](), device="cuda")
    made = estimate_memory(recipe)
    gib = 2**30
    assert made.tokens == pytest.approx(258, abs=12), "about as many as with Qwen's tokenizer"
    actions, chat = (
        next(s for s in made.stages if s.stage.startswith(n)) for n in ("actions only", "actions and")
    )
    assert actions.device["backbone"] == pytest.approx(2 * made.tapped, rel=1e-3)
    assert chat.device["backbone"] == pytest.approx(2 * made.backbone, rel=1e-3)
    states = ("trained", "gradients", "moments", "average")
    cached = made.stage("Stage II, cached")
    assert sum(cached.device[name] for name in states) == pytest.approx(20 * made.policy, rel=1e-3)
    assert 13 * gib < cached.peak < 48 * gib
    stage1 = made.stage("Stage I")
    assert sum(stage1.device[name] for name in states[:3]) == pytest.approx(16 * 7.66e9, rel=0.01)
