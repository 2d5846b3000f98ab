"""Estimates of `blm memory` against what torch allocates on the CPU, for tiny models.

Used by `benchmarks/memory.py`, and by the tests, which bound the difference.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from blm.app.memory.tracking import empty, strip_values
from blm.app.memory.work import (
    TrainingMemory,
    act,
    choose_without_values,
    size_of,
    stage1_step,
    stage2_step,
    tap,
)
from blm.backbone import Backbone
from blm.backbone.prompt import control_prompt
from blm.backbone.published_shapes import shape_of
from blm.backbone.stand_in import stand_in
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
from blm.types import Message


@dataclass(frozen=True)
class Comparison:
    """Bytes of one piece of work."""

    estimated: int
    measured: int

    @property
    def difference(self) -> float:
        """Relative difference of the estimate from the measurement."""
        return self.estimated / self.measured - 1


def allocated_peak(run: Callable[[], object]) -> int:
    """Return the largest number of bytes that torch's allocator held more than before, while `run` ran.

    It counts what the allocator gives out, so it knows nothing of tensors, operators or autograd.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler warns of its own settings
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
            run()
    held = peak = 0
    assert record.profiler is not None
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def small_qwen(device: str = "cpu", **text: Any) -> Backbone:
    """A Qwen2.5-VL of a few million parameters, in the real classes, on a device."""
    config: Any = shape_of("qwen2_5_vl_3b")
    changes = {
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {**config.text_config.rope_parameters, "mrope_section": [4, 6, 6]},
    }
    for name, value in {**changes, **text}.items():
        setattr(config.text_config, name, value)
    vision = config.vision_config
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 2, 64, 128, 4
    vision.out_hidden_size, vision.fullatt_block_indexes = 128, [1]
    return stand_in(config, device=device)


def talk(seed: int, *, picture: bool = True) -> tuple[Message, ...]:
    rng = np.random.default_rng(seed)
    pixels = {"base": rng.integers(0, 256, (112, 112, 3), np.uint8)} if picture else {}
    more = (Message("user", ("What is the next primitive?",)), Message("assistant", ("move it on",) * 9))
    return (*control_prompt("push the cube", "panda", pixels), Message("assistant", ("grasp it",)), *more)


def held(estimate: TrainingMemory) -> int:
    """What the training thread holds from the second step on, after the first checkpoint."""
    return estimate.peak - estimate.batch + estimate.state


TALKS = [talk(seed) for seed in range(6)]
LOOP = LoopConfig(steps=2, batch_size=len(TALKS), lr=1e-4, save_every=1)
STAGE1: dict[str, Stage1Config] = {
    "full": Stage1Config(loop=LOOP),
    "full, two micro-batches, Muon": Stage1Config(loop=replace(LOOP, accumulate=2, muon=1e-3)),
    "frozen tower": Stage1Config(loop=LOOP, vision_scale=0.0, checkpoint_blocks=True),
    "LoRA": Stage1Config(loop=LOOP, lora=Lora(rank=8), checkpoint_blocks=True),
    "LoRA, packed": Stage1Config(loop=LOOP, lora=Lora(rank=8), pack_length=1000),
}


def stage1_memory(name: str, folder: Path) -> Comparison:
    """Compare steps of Stage I with a config of STAGE1.

    Batches are left out: a thread makes them, and the profiler sees the thread that trains.
    """
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
    measured = weights + allocated_peak(lambda: train_stage1(real, sources, config, folder / "out"))
    assert estimate.activations > 0.1 * estimate.peak, "wrong activations would not be noticed"
    return Comparison(held(estimate), measured)


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


def stage2_memory(folder: Path) -> Comparison:
    """Compare steps of Stage II from a cache."""
    config = LoopConfig(steps=2, batch_size=SAMPLES, lr=1e-4, save_every=1)
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

        run_loop(network, loss, next_batch, config, folder / "out", ema=ema)

    measured = size_of([*network.parameters(), *network.buffers()]) + allocated_peak(train)
    return Comparison(held(estimate), measured)


def acting_memory() -> dict[str, Comparison]:
    """Compare choosing actions, and filling a hidden-state cache, beside the weights."""
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
    acting = Comparison(act(outline, bare, inputs, 3), measured)

    config = HiddenStateConfig(layer=3, cameras=("base", "wrist"), batch_size=4)
    dataset = cast(Any, SimpleNamespace(space=SimpleNamespace(robot="panda")))
    live = LiveHiddenStates(real, dataset, config)
    live.tap(texts, images)  # counts the features of a picture once
    few, some = (tap(outline, real.read(prompts[:n]), 3) for n in (1, 3))
    pixels = size_of(real.read(prompts).values())  # in memory of NumPy, which the profiler does not see
    measured = allocated_peak(lambda: live.tap(texts, images)) + pixels
    return {"acting": acting, "cache fill": Comparison(few + 3 * (some - few) // 2, measured)}
