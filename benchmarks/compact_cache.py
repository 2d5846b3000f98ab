"""Compact hidden-state caches: their size, their error and Stage II samples/s, beside float16.

    python benchmarks/compact_cache.py --datasets DATA/panda DATA/xarm6 [--model blm-nano]
    python benchmarks/compact_cache.py --datasets DATA/panda --backbone smol --layer 20 --pools 1 2

It copies the first episodes of each task of the datasets, fills a cache of every variant, and
prints one JSON object. `tokens` are errors of normalised tokens, relative to their norm; `intent`
compares the intent tokens of the model's bridge, and `actions` its normalised actions from the same
noise, with those from hidden states in float32 without pooling. With --backbone the bridge and the
policy are untrained, so these two show rounding, and not what a trained policy would do. Speeds are
taken in turns; the interval of the ratio to float16 is a 95 % t-interval of its logarithm over the
repeats.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch.nn import functional as F

from blm.backbone.backbone import Backbone
from blm.datasets.lerobot import EpisodeDataset, finalize_dataset, open_dataset, stage_episode
from blm.evaluation.results import this_machine
from blm.policy.network import PolicyBatch, PolicyConfig, PolicyNetwork
from blm.policy.policy import CheckpointPolicy
from blm.training.loop.loop import LoopConfig
from blm.training.policy.add_robot import InitialPolicy, from_scratch
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hashed_backbone import HashedBackbone
from blm.training.policy.hidden_state_cache import CacheShard, coding_error
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.policy.open_data import make_sampler, open_codec, open_datasets
from blm.training.policy.sampler import PolicySampler

T_975 = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % quantile of Student's t by number of repeats (one fewer degrees of freedom)."""


@dataclass(frozen=True)
class Model:
    """What the caches are made for."""

    backbone: Backbone
    layer: int
    start: InitialPolicy
    trained: bool


def load(model: str, backbone: str, layer: int, robots: Sequence[str]) -> Model:
    """Return a checkpoint, or a backbone with an untrained policy."""
    if not backbone:
        policy = CheckpointPolicy.load(model)
        start = InitialPolicy(policy.network, tuple(policy.contract.action_spaces), policy)
        return Model(policy.backbone, policy.tap.layer, start, trained=True)
    loaded = Backbone.load(backbone)
    loaded.freeze()
    start = from_scratch(PolicyConfig(), loaded.hidden_size, robots, seed=0)
    return Model(loaded, layer, start, trained=False)


def first_episodes(dataset: EpisodeDataset, folder: Path, count: int) -> Path:
    """Copy the first `count` episodes of each task of a dataset."""
    taken, staged = Counter[str](), list[Path]()
    for number, task in enumerate(dataset.tasks):
        if taken[task] < count:
            taken[task] += 1
            stage_episode(folder / "staging", f"{dataset.space.robot}-{number}", dataset.episode(number))
            staged.append(folder / "staging" / f"{dataset.space.robot}-{number}")
    return finalize_dataset(
        staged,
        folder / dataset.space.robot,
        space=dataset.space,
        cameras=dataset.cameras,
        image_size=dataset.image_size,
        provenance={},
    )


def trainer(network: PolicyNetwork) -> Callable[[PolicyBatch], None]:
    """Return a function that runs one Stage II step on a copy of the network."""
    trained = copy.deepcopy(network).requires_grad_(True).train()
    teacher = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(trained.parameters(), 1e-4)

    def step(batch: PolicyBatch) -> None:
        optimizer.zero_grad()
        trained.loss(batch, teacher)["loss"].backward()
        optimizer.step()

    return step


def rate(sampler: PolicySampler, step: Callable[[PolicyBatch], None], steps: range) -> float:
    """Return samples/s of sampling, decoding and training, on the CPU."""
    begin, samples = time.perf_counter(), 0
    for number in steps:
        batch = sampler(number)
        samples += len(batch.tau)
        step(batch.to("cpu"))
    return samples / (time.perf_counter() - begin)


@torch.no_grad()
def compare(network: PolicyNetwork, live: PolicyBatch, cached: PolicyBatch) -> dict[str, dict[str, float]]:
    """Return differences of intent tokens and of actions from the same noise."""
    intents = [network.bridge(batch.hidden, batch.mask) for batch in (live, cached)]
    dims = live.real.any(1)
    actions = [
        network.sample(batch.hidden, batch.mask, live.state, live.embodiment, live.noise, dims)
        for batch in (live, cached)
    ]
    cosine = F.cosine_similarity(intents[0], intents[1], dim=-1)
    chunks = dims[:, None].expand(actions[0].shape)
    difference = (actions[0] - actions[1])[chunks].abs()
    return {
        "intent": {"mean_cosine": float(cosine.mean()), "smallest_cosine": float(cosine.min())},
        "actions": {
            "mean_difference": float(difference.mean()),
            "largest_difference": float(difference.max()),
            "their_deviation": float(actions[0][chunks].std()),
        },
    }


def cache_facts(folder: Path) -> dict[str, Any]:
    """Return size and error of the caches below a folder."""
    stored = [json.loads(path.read_text()) for path in sorted(folder.glob("*/manifest.json"))]
    shards = [CacheShard(**shard) for manifest in stored for shard in manifest.values()]
    error, frames = coding_error(shards), sum(len(shard.frames) for shard in shards)
    specs = [json.loads(path.read_text()) for path in folder.glob("*/spec.json")]
    return {
        "bytes_per_frame": sum(shard.bytes for shard in shards) / frames,
        "tokens_per_frame": sum(sum(shard.lengths) for shard in shards) / frames,
        "frames": frames,
        **({"tokens": vars(error), "explained_variance": specs[0]["explained"]} if error is not None else {}),
    }


def variants(intents: HiddenStateConfig, dims: Sequence[int], pools: Sequence[int]) -> dict[str, Any]:
    """Return name -> config; float16 without pooling first."""
    made = {}
    for pool in pools:
        suffix = f", pooled {pool} x {pool}" if pool > 1 else ""
        made[f"float16{suffix}"] = replace(intents, pool=pool)
        for kept in dims:
            made[f"compact {kept}{suffix}"] = replace(intents, pool=pool, precision="compact", dims=kept)
    return made


def main(
    datasets: tuple[Path, ...],
    model: str = "blm-nano",
    backbone: str = "",
    layer: int = 3,
    dims: tuple[int, ...] = (1024,),
    pools: tuple[int, ...] = (1,),
    episodes: int = 1,
    batch_size: int = 32,
    repeats: int = 5,
) -> None:
    """Print one JSON object.

    Args:
        datasets: Dataset folders, one per robot.
        model: Checkpoint or release.
        backbone: Backbone to use, with an untrained policy, instead of a checkpoint.
        layer: Tapped block of that backbone.
        dims: Kept channels of the compact caches.
        pools: Sides of the pooled squares of picture tokens.
        episodes: Episodes of each robot and task.
        batch_size: Samples of a training step, and samples that are compared.
        repeats: Number of speed measurements, of 4 steps each, 3 to 10.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folders = tuple(first_episodes(open_dataset(folder), work, episodes) for folder in datasets)
        opened = [open_dataset(folder) for folder in folders]
        chosen = load(model, backbone, layer, [data.space.robot for data in opened])
        config = PolicyTrainingConfig(
            datasets=folders,
            backbone=backbone or model,
            intents=HiddenStateConfig(
                layer=chosen.layer, cameras=opened[0].cameras, workers=0, stride=2, batch_size=batch_size
            ),
            loop=LoopConfig(steps=1, batch_size=batch_size),
            policy=chosen.start.network.config,
        )
        hashed = HashedBackbone.of(chosen.backbone, config.backbone)

        def sampler_of(one: PolicyTrainingConfig) -> PolicySampler:
            codec = open_codec(hashed, opened, one)
            return make_sampler(open_datasets(hashed, opened, one, chosen.start, codec), one)

        live = sampler_of(config)(0)
        samplers, facts = dict[str, PolicySampler](), dict[str, dict[str, Any]]()
        for name, intents in variants(config.intents, dims, pools).items():
            one = replace(config, intents=intents, cache=work / name)
            samplers[name] = sampler_of(one)
            there = samplers[name](0).to("cpu")
            facts[name] = cache_facts(work / name) | compare(chosen.start.network, live, there)
        steps = trainer(chosen.start.network)
        rates: dict[str, list[float]] = {name: [] for name in samplers}
        for repeat in range(-1, repeats):  # the first repeat warms up
            for name, sampler in samplers.items():
                value = rate(sampler, steps, range(repeat * 4 + 4, repeat * 4 + 8))
                rates[name] += [value] if repeat >= 0 else []
    for name, values in rates.items():
        logs = np.log(np.array(values) / np.array(rates["float16"]))
        half = T_975[repeats] * logs.std(ddof=1) / repeats**0.5
        facts[name]["samples_per_s"] = float(np.mean(values))
        facts[name]["speed_of_float16"] = np.exp(
            [logs.mean(), logs.mean() - half, logs.mean() + half]
        ).tolist()
    result = {
        "model": backbone or model,
        "trained_policy": chosen.trained,
        "layer": chosen.layer,
        "hidden_size": chosen.backbone.hidden_size,
        "robots": [data.space.robot for data in opened],
        "variants": facts,
        "compared_samples": batch_size,
        "repeats": repeats,
        "samples_per_repeat": 4 * batch_size,
        "machine": this_machine().to_json(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
