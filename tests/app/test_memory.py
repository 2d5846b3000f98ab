"""Memory of recipes: estimates from models without values, against what torch allocates for real ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from blm.app.memory.estimate import MemoryEstimate, estimate_memory
from blm.app.memory.outline import count_parameters, outline_backbone
from blm.app.memory.table import describe
from blm.app.memory.tracking import TensorMemory, empty, strip_values
from blm.app.memory.work import act, choose_without_values, size_of, stage1_step, stage2_step, tap
from blm.app.recipes import RECIPES
from blm.backbone import Backbone
from blm.backbone.prompt import control_prompt
from blm.backbone.published_shapes import shape_of
from blm.bridge import BridgeConfig
from blm.policy.network import PolicyBatch, PolicyConfig, PolicyNetwork
from blm.training.loop.batches import Microbatch
from blm.training.loop.distributed import DataShard
from blm.training.loop.ema import Ema
from blm.training.loop.loop import LoopConfig, run_loop
from blm.training.policy.hidden_states import HiddenStateConfig, LiveHiddenStates
from blm.training.sft.lora import Lora
from blm.training.sft.mixture_sampler import MixtureSampler, TokenizedSource
from blm.training.sft.pack import pack
from blm.training.sft.tokenize import tokenize_conversation
from blm.training.sft.train import Stage1Config, TrainingSource, train_stage1
from blm.types import BlmError, Message, UnknownNameError
from tests.support.measured_memory import allocated_peak, small_qwen

WITHIN = 0.1
"""Largest relative difference of estimate and measurement.

Batches are compared apart: a thread makes them, and the profiler sees the thread that trains.
"""


def talk(seed: int, *, picture: bool = True) -> tuple[Message, ...]:
    rng = np.random.default_rng(seed)
    pixels = {"base": rng.integers(0, 256, (112, 112, 3), np.uint8)} if picture else {}
    more = (Message("user", ("What is the next primitive?",)), Message("assistant", ("move it on",) * 9))
    return (*control_prompt("push the cube", "panda", pixels), Message("assistant", ("grasp it",)), *more)


TALKS = [talk(seed) for seed in range(6)]
LOOP = LoopConfig(steps=2, batch_size=len(TALKS), lr=1e-4)
STAGE1: dict[str, Stage1Config] = {
    "full": Stage1Config(loop=LOOP),
    "full, two micro-batches, Muon": Stage1Config(loop=replace(LOOP, accumulate=2, muon=1e-3)),
    "frozen tower": Stage1Config(loop=LOOP, vision_scale=0.0, checkpoint_blocks=True),
    "LoRA": Stage1Config(loop=LOOP, lora=Lora(rank=8), checkpoint_blocks=True),
    "LoRA, packed": Stage1Config(loop=LOOP, lora=Lora(rank=8), pack_length=1000),
}
SLOW = ("full, two micro-batches, Muon", "frozen tower", "LoRA, packed")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in STAGE1]
)
def test_stage_one_takes_the_estimated_memory(name: str, tmp_path: Path) -> None:
    config = STAGE1[name]
    real, outline = small_qwen(), strip_values(small_qwen("meta").model)
    backbone = Backbone(outline, real.processor)
    choose_without_values(backbone, config)
    examples = [tokenize_conversation(real, one, config.limits, None, Counter()) for one in TALKS]
    source = TokenizedSource(name="made", examples=[one for one in examples if one is not None])
    sampler = MixtureSampler(
        [source],
        examples_per_step=len(TALKS),
        pack_length=config.pack_length,
        seed=config.loop.seed,
        world_size=config.loop.accumulate,
    )
    sequences = [[source.examples[index] for _, index in one] for one in sampler.sequences(0)]
    estimate = stage1_step(backbone, config, pack(real, sequences, ()), mixed=False)

    weights = size_of([*real.model.parameters(), *real.model.buffers()])
    sources = [TrainingSource(name="made", conversations=TALKS)]
    measured = weights + allocated_peak(lambda: train_stage1(real, sources, config, tmp_path / "out"))
    assert estimate.peak - estimate.batch == pytest.approx(measured, rel=WITHIN), estimate
    assert estimate.activations > 0.1 * estimate.peak, "the test would not notice wrong activations"


POLICY = PolicyConfig(bridge=BridgeConfig(width=64, latents=8, blocks=2, heads=4), width=128, max_dim=8)
HIDDEN, TOKENS, SAMPLES = 128, 60, 24


def policy_batch(hidden: Callable[..., torch.Tensor]) -> PolicyBatch:
    chunk, seen = (SAMPLES, POLICY.horizon, POLICY.max_dim), torch.ones(SAMPLES, TOKENS, dtype=torch.bool)
    return PolicyBatch(
        hidden=hidden(SAMPLES, TOKENS, HIDDEN),
        mask=seen,
        future_hidden=hidden(SAMPLES, TOKENS, HIDDEN),
        future_mask=seen.clone(),
        state=torch.zeros(SAMPLES, POLICY.max_dim),
        actions=torch.zeros(chunk),
        real=torch.ones(chunk, dtype=torch.bool),
        embodiment=torch.zeros(SAMPLES, dtype=torch.long),
        noise=torch.randn(chunk),
        tau=torch.rand(SAMPLES),
        ids=range(SAMPLES),
    )


def test_stage_two_from_the_cache_takes_the_estimated_memory(tmp_path: Path) -> None:
    config = LoopConfig(steps=2, batch_size=SAMPLES, lr=1e-4)
    with torch.device("meta"):
        outline = strip_values(PolicyNetwork(POLICY, HIDDEN, 2))
    estimate = stage2_step(outline, POLICY.ema, config, policy_batch(empty), mixed=False)

    network = PolicyNetwork(POLICY, HIDDEN, 2)

    def train() -> None:
        ema = Ema(network, POLICY.ema)
        teacher = cast(PolicyNetwork, ema.module)

        def loss(batch: PolicyBatch) -> tuple[torch.Tensor, dict[str, Any]]:
            return network.loss(batch, teacher)["loss"], {}

        def next_batch(step: int, part: DataShard) -> Microbatch[PolicyBatch]:
            return Microbatch(policy_batch(torch.zeros), range(SAMPLES))

        run_loop(network, loss, next_batch, config, tmp_path / "out", ema=ema)

    measured = size_of([*network.parameters(), *network.buffers()]) + allocated_peak(train)
    assert estimate.peak - estimate.batch == pytest.approx(measured, rel=WITHIN), estimate


def test_acting_and_cache_filling_take_the_estimated_memory() -> None:
    real = small_qwen()
    real.freeze()
    outline = Backbone(strip_values(small_qwen("meta").model), real.processor)
    network = PolicyNetwork(POLICY, HIDDEN, 2).eval().requires_grad_(False)
    with torch.device("meta"):
        bare = strip_values(PolicyNetwork(POLICY, HIDDEN, 2)).eval().requires_grad_(False)
    images = {"base": np.zeros((4, 112, 112, 3), np.uint8), "wrist": np.zeros((4, 112, 112, 3), np.uint8)}
    texts = ["push the cube"] * 4
    prompts = [control_prompt("push the cube", "panda", {n: x[0] for n, x in images.items()})] * 4

    inputs = real.read(prompts[:1])
    state, robot = torch.zeros(1, POLICY.max_dim), torch.zeros(1, dtype=torch.long)
    noise, dims = torch.randn(1, POLICY.horizon, POLICY.max_dim), torch.ones(1, POLICY.max_dim).bool()

    def choose() -> None:
        tapped = real.tap(real.place(inputs), 3)
        network.sample(tapped.hidden, tapped.mask, state, robot, noise, dims)

    measured = allocated_peak(choose) + size_of(inputs.values())
    assert act(outline, bare, inputs, 3) == pytest.approx(measured, rel=WITHIN)

    config = HiddenStateConfig(layer=3, cameras=("base", "wrist"), batch_size=4)
    dataset = cast(Any, SimpleNamespace(space=SimpleNamespace(robot="panda")))
    live = LiveHiddenStates(real, dataset, config)
    live.tap(texts, images)  # counts the features of a picture once
    few, some = (tap(outline, real.read(prompts[:n]), 3) for n in (1, 3))
    pixels = size_of(real.read(prompts).values())  # in memory of NumPy, which the profiler does not see
    measured = allocated_peak(lambda: live.tap(texts, images)) + pixels
    assert few + 3 * (some - few) / 2 == pytest.approx(measured, rel=WITHIN)


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
    text = describe(nano, "cpu")
    assert "2.3 M parameters" in text and "each process" in text and "Stage II, live" in text


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
    assert made.stage("acting").device["backbone"] == pytest.approx(2 * made.backbone, rel=1e-3)
    states = ("trained", "gradients", "moments", "average")
    cached = made.stage("Stage II, cached")
    assert sum(cached.device[name] for name in states) == pytest.approx(20 * made.policy, rel=1e-3)
    assert 13 * gib < cached.peak < 48 * gib
    stage1 = made.stage("Stage I")
    assert sum(stage1.device[name] for name in states[:3]) == pytest.approx(16 * 7.66e9, rel=0.01)
