"""The data of a run of Stage II: its episodes, split and normalised, with their hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from blm.datasets.lerobot import EpisodeDataset
from blm.training.loop.distributed import Processes
from blm.training.policy.add_robot import InitialPolicy
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hashed_backbone import HashedBackbone
from blm.training.policy.hidden_state_cache import ALONE, cache_hidden_states
from blm.training.policy.hidden_states import LiveHiddenStates
from blm.training.policy.projection import open_projection
from blm.training.policy.prompt_features import cache_prompts
from blm.training.policy.quantization import TokenCodec
from blm.training.policy.sampler import HiddenStateSource, PolicyDataset, PolicySampler, split


def open_datasets(
    hashed: HashedBackbone,
    datasets: Sequence[EpisodeDataset],
    config: PolicyTrainingConfig,
    start: InitialPolicy,
    codec: TokenCodec | None,
    processes: Processes = ALONE,
) -> list[PolicyDataset]:
    """Split the episodes, fit the transforms, and open the hidden states; all of `processes` fill
    the caches, where needed. `codec` is that of `open_codec`."""
    opened = split(
        datasets,
        config.policy,
        stride=config.intents.stride,
        held_out=config.held_out,
        seed=config.loop.seed,
        robots=start.robots,
        transforms=start.transforms(),
    )

    def source(dataset: EpisodeDataset, name: str) -> HiddenStateSource:
        if config.tune.on:
            assert config.tune.features is not None, "`train_stage2` chooses the folder"
            features = Path(config.tune.features) / name
            return cache_prompts(hashed, dataset, config.intents, features, processes)
        if config.cache is None:
            return LiveHiddenStates(hashed.backbone, dataset, config.intents)
        return cache_hidden_states(hashed, dataset, config.intents, config.cache / name, processes, codec)

    return [
        replace(one, hidden_states=source(one.dataset, name))
        for one, name in zip(opened, cache_names(datasets), strict=True)
    ]


def open_codec(
    hashed: HashedBackbone,
    datasets: Sequence[EpisodeDataset],
    config: PolicyTrainingConfig,
    processes: Processes = ALONE,
) -> TokenCodec | None:
    """Return the codec of the run's caches; None if they are not compact, or there are none."""
    if config.cache is None:
        return None
    return open_projection(hashed, datasets, config.intents, config.cache, processes)


def cache_names(datasets: Sequence[EpisodeDataset]) -> list[str]:
    """Return the folder names of caches: "panda" for a robot's first dataset, then "panda-2"."""
    names = [data.space.robot for data in datasets]
    counts = (names[: number + 1].count(name) for number, name in enumerate(names))
    return [name if count == 1 else f"{name}-{count}" for name, count in zip(names, counts, strict=True)]


def make_sampler(
    datasets: Sequence[PolicyDataset], config: PolicyTrainingConfig, *, train: bool = True
) -> PolicySampler:
    """Return the sampler of training frames, or of held-out frames."""
    return PolicySampler(
        datasets,
        config.policy,
        batch_size=config.loop.batch_size,
        seed=config.loop.seed,
        weights=config.weights,
        views=config.intents.views,
        train=train,
    )
