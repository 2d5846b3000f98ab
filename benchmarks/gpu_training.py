"""Speed of filling a hidden-state cache, of Stage II and of Stage I."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import cast

import intents
import numpy as np
import torch
from gpu_setting import CAMERAS, INSTRUCTION, WORDS, Clock, Numbers, Setting, attempt, rate, wait, with_peak

from blm.backbone.precision import place_weights
from blm.backbone.prompt import question_prompt
from blm.datasets.lerobot import open_dataset
from blm.policy.network import PolicyBatch, PolicyNetwork
from blm.training.loop.batches import Microbatch, prefetch
from blm.training.loop.distributed import DataShard, Processes
from blm.training.loop.ema import Ema
from blm.training.loop.loop import LoopConfig
from blm.training.loop.optimizers import Optimizers
from blm.training.policy.add_robot import from_scratch
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.policy.open_data import make_sampler, open_datasets
from blm.training.policy.sampler import PolicySampler
from blm.training.sft.feature_cache import cache_features
from blm.training.sft.lora import Lora
from blm.training.sft.loss import MaskedLossModel
from blm.training.sft.mixture_sampler import MixtureSampler, TokenizedSource
from blm.training.sft.pack import ExampleBatch, pack
from blm.training.sft.prefix_attention import use_prefix_attention
from blm.training.sft.tokenize import TokenizationConfig, TokenizedExample, tokenize_conversation
from blm.training.sft.train import Stage1Config, choose_trained, without_placeholder_checks
from blm.types import Message


def cache_fill(setting: Setting, clock: Clock, found: Numbers) -> None:
    """Measure the frames a second at which a hidden-state cache is filled."""
    for cameras in setting.cameras:
        attempt(found, f"{cameras} cameras", clock, lambda clock: _fill(setting, cameras))  # noqa: B023


def _config(setting: Setting, cameras: int, *, cached: bool) -> PolicyTrainingConfig:
    names, folder = CAMERAS[:cameras], setting.folder / f"{cameras}"
    if not (folder / "arm").exists():
        intents.make_dataset(folder, setting.episodes, cameras=names, side=setting.side)
    return PolicyTrainingConfig(
        datasets=(folder / "arm",),
        backbone="random",
        intents=HiddenStateConfig(layer=setting.layer, cameras=names, workers=0),
        loop=LoopConfig(steps=1, batch_size=setting.stage2_batch),
        policy=setting.policy,
        cache=folder / "cache" if cached else None,
        execute=setting.policy.horizon // 2,
        held_out=0.0,
        device=str(setting.device),
    )


def _sampler(setting: Setting, config: PolicyTrainingConfig) -> PolicySampler:
    datasets = [open_dataset(folder) for folder in config.datasets]
    start = from_scratch(config.policy, setting.backbone.hidden_size, ["arm"], seed=setting.seed)
    return make_sampler(open_datasets(setting.backbone, datasets, config, start), config)


def _fill(setting: Setting, cameras: int) -> Numbers:
    config = _config(setting, cameras, cached=True)
    assert config.cache is not None
    shutil.rmtree(config.cache, ignore_errors=True)
    frames = sum(open_dataset(folder).num_frames for folder in config.datasets)
    wait(setting)
    begin = time.perf_counter()
    numbers = with_peak(setting, lambda: {"tokens": _sampler(setting, config)(0).hidden.shape[1]})
    seconds = time.perf_counter() - begin
    size = sum(path.stat().st_size for path in config.cache.rglob("*.npy"))
    return numbers | {"frames_per_s": frames / seconds, "bytes_per_frame": size / frames, "n": frames}


def stage2(setting: Setting, clock: Clock, found: Numbers) -> None:
    """Measure samples a second of Stage II from a cache and live."""
    variants = {"cached": True, "live": False}
    cases = [(cameras, name) for cameras in setting.cameras for name in variants]
    for number, (cameras, name) in enumerate(cases):
        own = clock.first(1 / (len(cases) - number))
        config = _config(setting, cameras, cached=variants[name])
        attempt(found, f"{cameras} cameras, {name}", own, lambda own: _train2(setting, config, own))  # noqa: B023


def _train2(setting: Setting, config: PolicyTrainingConfig, clock: Clock) -> Numbers:
    """Return samples/s of the steps of Stage II: prefetching, loss, AdamW and moving average."""
    sampler, network = _sampler(setting, config), setting.network()
    ema = Ema(network, setting.policy.ema)
    teacher = cast(PolicyNetwork, ema.module)
    optimizer = _optimizer(network, config.loop)

    def microbatch(step: int, shard: DataShard) -> Microbatch[PolicyBatch]:
        batch = sampler(step, shard)
        return Microbatch(batch, batch.ids)

    batches = prefetch(microbatch, range(40), [DataShard()], pin=setting.on_gpu)
    waited = []

    def step(number: int) -> float:
        (one,), wait = next(batches)
        waited.append(wait)
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16) if setting.on_gpu else nullcontext():
            loss = network.loss(one.batch.to(setting.device), teacher)["loss"]
        loss.backward()
        optimizer.step(1.0)
        ema.update(network, number)
        return len(one.ids)

    begin = time.perf_counter()
    found = with_peak(setting, lambda: rate(setting, clock, step))
    found["samples_per_s"] = found.pop("per_s")
    found["data_share"] = sum(waited) / (time.perf_counter() - begin)
    batches.close()
    return found | {"batch": setting.stage2_batch}


def _optimizer(module: torch.nn.Module, loop: LoopConfig) -> Optimizers:
    return Optimizers(
        module,
        lambda name: loop.lr,
        lr=loop.lr,
        muon=loop.muon,
        betas=loop.betas,
        weight_decay=loop.weight_decay,
    )


def stage1(setting: Setting, clock: Clock, found: Numbers) -> None:
    """Measure tokens a second of Stage I, packed and padded: with LoRA, then of all weights but the
    vision tower. The last part, because it changes the backbone."""
    backbone = setting.backbone
    place_weights(backbone.model, setting.device, torch.float32)
    loop = LoopConfig(steps=1, batch_size=setting.stage1_examples, lr=1e-5)
    full = Stage1Config(
        loop=loop,
        vision_scale=0.0,
        pack_length=setting.pack_length,
        cache_features=True,
        checkpoint_blocks=True,
        limits=TokenizationConfig(max_length=setting.pack_length),
    )
    lora = replace(full, lora=Lora(rank=16), vision_scale=None, projector_scale=0.0)
    for config, name, share in ((lora, "LoRA 16", 0.6), (full, "all but the vision tower", 1.0)):
        own = clock.first(share)
        attempt(found, name, own, lambda own: _train1(setting, config, own))  # noqa: B023


def _train1(setting: Setting, config: Stage1Config, clock: Clock) -> Numbers:
    backbone, found = setting.backbone, Numbers()
    adapted = choose_trained(backbone, config, exact=False)
    made = _examples(setting, config.limits)
    folder = setting.folder / f"features-{'lora' if config.lora.rank else 'full'}"
    [examples] = cache_features(backbone, [made], folder, Processes(0, 1, setting.device)).examples
    model = MaskedLossModel(backbone, cached=True).train()
    backbone.model.activation_checkpointing_enable()
    optimizer = _optimizer(backbone.model, config.loop)
    try:
        for name, length in (("packed", config.pack_length), ("padded", 0)):
            batches = _batches(setting, examples, length)

            def step(number: int, batches: Sequence[ExampleBatch] = batches) -> float:
                batch = batches[number % len(batches)]
                optimizer.zero_grad()
                with torch.autocast("cuda", torch.bfloat16) if setting.on_gpu else nullcontext():
                    sums = model(batch)
                (sums.loss_sum / sums.tokens).backward()
                optimizer.step(1.0)
                return batch.tokens

            def measure(clock: Clock, step=step) -> Numbers:  # type: ignore[no-untyped-def]
                numbers = with_peak(setting, lambda: rate(setting, clock, step))
                return {"tokens_per_s": numbers.pop("per_s")} | numbers

            with use_prefix_attention(backbone), without_placeholder_checks():
                attempt(found, name, clock.first(0.5 if name == "packed" else 1.0), measure)
            found[name]["padding"] = batches[0].padding
    finally:
        backbone.model.activation_checkpointing_disable()
        if adapted is not None:
            adapted.unload()
    return found


def _examples(setting: Setting, limits: TokenizationConfig) -> list[TokenizedExample]:
    """Return conversations: half about two pictures, half texts of 10 to 1000 words, mostly short."""
    rng = np.random.default_rng(setting.seed)
    made = []
    lengths = np.clip(rng.lognormal(np.log(120), 1.0, 64), 10, setting.pack_length // 4).astype(int)
    pictures = [list(one.values()) for one in setting.images(4, 2)]
    for number, length in enumerate(lengths):
        shown = pictures[number % len(pictures)] if number % 2 else []
        answer = Message("assistant", (" ".join(rng.choice(WORDS, length)),))
        talk = (*question_prompt(INSTRUCTION, shown), answer)
        example = tokenize_conversation(setting.backbone, talk, limits, None, Counter())
        assert example is not None
        made.append(example)
    return made


def _batches(setting: Setting, examples: Sequence[TokenizedExample], length: int) -> list[ExampleBatch]:
    source = TokenizedSource(name="mixed", examples=examples)
    sampler = MixtureSampler(
        [source], examples_per_step=setting.stage1_examples, pack_length=length, seed=setting.seed
    )
    steps = [sampler.sequences(step) for step in range(4)]
    return [
        pack(setting.backbone, [[examples[index] for _, index in sequence] for sequence in sequences], ())
        for sequences in steps
    ]
