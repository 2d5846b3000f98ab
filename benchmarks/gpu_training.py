"""Speed of filling a hidden-state cache, of Stage II and of Stage I."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, cast, get_args

import intents
import numpy as np
import torch
from gpu_setting import (
    CAMERAS,
    INSTRUCTION,
    MOST_STEPS,
    WORDS,
    Clock,
    Numbers,
    Setting,
    attempt,
    rate,
    wait,
    with_peak,
)

from blm.app.memory.tracking import empty
from blm.app.memory.work import choose_without_values, size_of, stage1_step, stage2_step, tap
from blm.backbone.precision import place_weights
from blm.backbone.prompt import control_prompt, question_prompt
from blm.datasets.lerobot import EpisodeDataset, open_dataset
from blm.policy.network import PolicyBatch, PolicyNetwork
from blm.training.loop.batches import ByWorkers, MakeBatch, Microbatch, open_batches
from blm.training.loop.distributed import DataShard, Processes
from blm.training.loop.ema import Ema
from blm.training.loop.loop import LoopConfig
from blm.training.loop.optimizers import Optimizers
from blm.training.policy.add_robot import from_scratch
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hashed_backbone import HashedBackbone
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.policy.live import LiveBatches, open_live
from blm.training.policy.open_data import make_sampler, open_codec, open_datasets
from blm.training.policy.sampler import PolicyDataset, PolicySampler
from blm.training.sft.feature_cache import cache_features
from blm.training.sft.lora import Lora
from blm.training.sft.loss import MaskedLossModel
from blm.training.sft.mixture_sampler import MixtureSampler, TokenizedSource
from blm.training.sft.pack import ExampleBatch, pack
from blm.training.sft.prefix_attention import use_prefix_attention
from blm.training.sft.tokenize import TokenizationConfig, TokenizedExample, tokenize_conversation
from blm.training.sft.train import Stage1Config, choose_trained, without_placeholder_checks
from blm.types import Message

Form = Literal["cached", "compact", "live"]
"""Where the hidden states of Stage II come from."""


def cache_fill(setting: Setting, clock: Clock, found: Numbers) -> None:
    """Measure the frames a second at which a hidden-state cache is filled."""
    for cameras in setting.cameras:
        attempt(found, f"{cameras} cameras", clock, lambda clock: _fill(setting, cameras))  # noqa: B023


def _config(setting: Setting, cameras: int, form: Form) -> PolicyTrainingConfig:
    names, folder = CAMERAS[:cameras], setting.folder / f"{cameras}"
    if not (folder / "arm").exists():
        intents.make_dataset(folder, setting.episodes, cameras=names, side=setting.side)
    return PolicyTrainingConfig(
        datasets=(folder / "arm",),
        backbone="random",
        intents=HiddenStateConfig(
            layer=setting.layer,
            cameras=names,
            workers=setting.workers if form == "live" else 0,
            precision="compact" if form == "compact" else "float16",
        ),
        loop=LoopConfig(steps=1, batch_size=setting.stage2_batch),
        policy=setting.policy,
        cache=folder / form if form != "live" else None,
        execute=setting.policy.horizon // 2,
        held_out=0.0,
        device=str(setting.device),
    )


def _datasets(setting: Setting, config: PolicyTrainingConfig) -> list[PolicyDataset]:
    datasets = [open_dataset(folder) for folder in config.datasets]
    start = from_scratch(config.policy, setting.backbone.hidden_size, ["arm"], seed=setting.seed)
    hashed = HashedBackbone(setting.backbone, config.backbone, "random weights")  # hashing takes minutes
    return open_datasets(hashed, datasets, config, start, open_codec(hashed, datasets, config))


def _fill(setting: Setting, cameras: int) -> Numbers:
    config = _config(setting, cameras, "cached")
    assert config.cache is not None
    shutil.rmtree(config.cache, ignore_errors=True)
    frames = sum(open_dataset(folder).num_frames for folder in config.datasets)
    (data,) = map(open_dataset, config.datasets)
    wait(setting)
    begin = time.perf_counter()

    def fill() -> Numbers:
        _datasets(setting, config)
        return {"seconds": time.perf_counter() - begin}

    numbers = with_peak(setting, fill, lambda: _weights(setting) + _tap_bytes(setting, config, data))
    size = sum(path.stat().st_size for path in config.cache.rglob("*.npy"))
    rate = frames / numbers.pop("seconds")
    return numbers | {"frames_per_s": rate, "bytes_per_frame": size / frames, "n": frames}


def _weights(setting: Setting) -> int:
    return size_of(setting.backbone.model.parameters())


def _tap_bytes(setting: Setting, config: PolicyTrainingConfig, dataset: EpisodeDataset) -> int:
    """Return what a pass of the backbone over a batch of frames takes."""
    images = setting.images(1, len(config.intents.cameras))[0]
    prompt = control_prompt(dataset.instructions[0], dataset.space.robot, images)
    inputs = setting.backbone.read([prompt] * config.intents.batch_size, side="right")
    return tap(setting.outline(), inputs, setting.layer)


def stage2(setting: Setting, clock: Clock, found: Numbers) -> None:
    """Measure samples a second of Stage II from a cache, from a compact cache, and live."""
    cases = [(cameras, form) for cameras in setting.cameras for form in get_args(Form)]
    for number, (cameras, form) in enumerate(cases):
        own = clock.first(1 / (len(cases) - number))
        config = _config(setting, cameras, form)
        attempt(found, f"{cameras} cameras, {form}", own, lambda own: _train2(setting, config, own))  # noqa: B023


def _train2(setting: Setting, config: PolicyTrainingConfig, clock: Clock) -> Numbers:
    """Return samples/s of the steps of Stage II: prefetching, loss, AdamW and moving average."""
    datasets, network = _datasets(setting, config), setting.network()
    ema = Ema(network, setting.policy.ema)
    teacher = cast(PolicyNetwork, ema.module)
    optimizer = _optimizer(network, config.loop)
    live, make = None, cast(MakeBatch[Any], _from_cache(make_sampler(datasets, config)))
    if config.cache is None:
        live = open_live(setting.backbone, str(setting.source()), datasets, config.intents)
        plain = [replace(one, hidden_states=None) for one in datasets]
        batches_of = LiveBatches(make_sampler(plain, config), live.reader, config.intents)
        make = ByWorkers(batches_of, config.intents.workers)
    waited, last = list[float](), list[PolicyBatch]()

    with open_batches(make, range(MOST_STEPS + 1), [DataShard()], pin=setting.on_gpu) as batches:

        def step(number: int) -> float:
            (one,), wait = next(batches)
            waited.append(wait)
            optimizer.zero_grad()
            batch = live.tap(one.batch) if live is not None else one.batch.to(setting.device)
            with torch.autocast("cuda", torch.bfloat16) if setting.on_gpu else nullcontext():
                loss = network.loss(batch, teacher)["loss"]
            loss.backward()
            optimizer.step(1.0)
            ema.update(network, number)
            last[:] = [batch]
            return len(one.ids)

        def measure() -> Numbers:
            numbers = rate(setting, clock, step)
            return {"samples_per_s": numbers.pop("per_s")} | numbers

        begin = time.perf_counter()
        found = with_peak(setting, measure, lambda: _predicted2(setting, config, last[0]))
        share = sum(waited[1:]) / (time.perf_counter() - begin)
    return found | {"data_share": share, "batch": setting.stage2_batch}


def _from_cache(sampler: PolicySampler) -> MakeBatch[PolicyBatch]:
    def make(step: int, shard: DataShard) -> Microbatch[PolicyBatch]:
        batch = sampler(step, shard)
        return Microbatch(batch, batch.ids)

    return make


def _predicted2(setting: Setting, config: PolicyTrainingConfig, batch: PolicyBatch) -> int:
    """Return the peak of a step beside the weights of the backbone."""
    hidden, future = empty(*batch.hidden.shape), empty(*batch.future_hidden.shape)
    bare = replace(batch, hidden=hidden, future_hidden=future).to("cpu")
    step = stage2_step(setting.network_outline(), setting.policy.ema, config.loop, bare, mixed=setting.on_gpu)
    live = 0 if config.cache is not None else _tap_bytes(setting, config, open_dataset(config.datasets[0]))
    return _weights(setting) + step.peak + live


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

            def measure(clock: Clock, step=step, batches=batches) -> Numbers:  # type: ignore[no-untyped-def]
                numbers = with_peak(
                    setting, lambda: rate(setting, clock, step), lambda: _predicted1(setting, config, batches)
                )
                return {"tokens_per_s": numbers.pop("per_s")} | numbers

            with use_prefix_attention(backbone), without_placeholder_checks():
                attempt(found, name, clock.first(0.5 if name == "packed" else 1.0), measure)
            found[name]["padding"] = batches[0].padding
    finally:
        backbone.model.activation_checkpointing_disable()
        if adapted is not None:
            adapted.unload()
    return found


def _predicted1(setting: Setting, config: Stage1Config, batches: Sequence[ExampleBatch]) -> int:
    backbone = setting.outline(torch.float32)
    choose_without_values(backbone, config)
    largest = max(batches, key=lambda batch: batch.loss_mask.numel())
    return stage1_step(backbone, config, largest, mixed=setting.on_gpu).peak


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
