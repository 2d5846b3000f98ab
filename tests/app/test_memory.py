"""Sizes of recipes, from models without memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blm.app.memory import count_parameters, describe, estimate_memory
from blm.app.recipes import RECIPES
from blm.backbone import Backbone
from blm.backbone.published_shapes import shape_of
from blm.policy.network import PolicyNetwork
from blm.types import UnknownNameError


@pytest.mark.parametrize(
    ("name", "parameters", "head"),
    [("qwen2_5_vl_3b", 3_754_622_976, 0), ("qwen2_5_vl_7b", 8_292_166_656, 152_064 * 3584)],
)
def test_shapes_have_the_published_number_of_parameters(name, parameters, head):
    """Half of "total_size" in model.safetensors.index.json of Qwen/Qwen2.5-VL-{3B,7B}-Instruct (bfloat16)."""
    recipe = RECIPES[name]()
    made, text = estimate_memory(recipe), shape_of(name).text_config
    assert made.backbone == parameters
    attention = text.hidden_size * (text.hidden_size * 2 + 2 * text.num_key_value_heads * 128)
    biases = text.hidden_size + 2 * text.num_key_value_heads * 128
    block = attention + biases + 3 * text.hidden_size * text.intermediate_size + 2 * text.hidden_size
    assert made.tapped == parameters - head - (text.num_hidden_layers - recipe.stage2.layer) * block
    assert made.tokens == 3 * (64 + 2) + 60, "224 px are 8 x 8 tokens"


def test_the_estimate_equals_a_real_model():
    recipe = RECIPES["nano"]()
    made, backbone = estimate_memory(recipe), Backbone.load("nano")
    assert made.backbone == count_parameters(backbone.model) and made.hidden == backbone.hidden_size
    policy = PolicyNetwork(recipe.stage2.policy, backbone.hidden_size, 4)
    assert made.policy == count_parameters(policy)
    assert made.policy == sum(value.numel() for value in policy.state_dict().values())
    last = count_parameters(backbone.decoder.layers[3])
    assert made.tapped == made.backbone - last, "words and head are one matrix"
    assert made.stage2_bytes == 20 * made.policy and made.inference_bytes == 2 * made.tapped + 4 * made.policy


def test_the_paper_s_scale_trains_from_the_cache_in_16_gib():
    made = estimate_memory(RECIPES["qwen2_5_vl_7b"]())
    assert made.stage2_bytes < 16 * 2**30 < 2 * made.backbone + made.stage2_bytes
    assert not torch.cuda.is_initialized() or torch.cuda.memory_allocated() == 0
    assert "8,292.2 M parameters" in describe(RECIPES["qwen2_5_vl_7b"]())
    with pytest.raises(UnknownNameError, match="qwen2_5_vl_7b"):
        shape_of("qwen2_5_vl_72b")


@pytest.mark.slow
def test_measured_memory_of_stage_two_confirms_the_estimate(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks/memory.py"
    command = [sys.executable, str(script), "--recipes", "smol", "--batch-sizes", "1", "9"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout[done.stdout.index("\n") :])["recipes"]["smol"]
    used = found["peak_gib"]["1"] - found["idle_gib"]
    assert found["weights_moments_average_gib"] == pytest.approx(
        estimate_memory(RECIPES["smol"]()).stage2_bytes / 2**30, abs=1e-3
    )
    assert found["weights_moments_average_gib"] < used < 0.3
    assert found["peak_gib"]["9"] > found["idle_gib"] and found["largest_batch_in_12_gib"] > 100
