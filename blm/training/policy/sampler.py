"""The sampler of Stage II: the frames of each step, and their batch.

The samples of a step, their noise and flow times are a function of (seed, step) alone. The data
shards of a step, on several processes or one after the other, together hold its samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from blm.datasets.lerobot import EpisodeDataset
from blm.datasets.mixture import IndexArray, Mixture, kept_frames, split_episodes
from blm.datasets.transforms import RobotTransforms, action_chunks, fit_transforms
from blm.pictures import joint_fit
from blm.policy.codec import pad_dims
from blm.policy.flow import sample_time
from blm.policy.heads import runs_of
from blm.policy.network import ActionBatch, HiddenStateCodec, PolicyBatch, PolicyConfig
from blm.seeds import reserved_seeds_warning
from blm.training.loop.distributed import DataShard
from blm.training.policy.hidden_states import collate
from blm.types import ActionSpace, BlmError, PolicyContract, joint_training

WHOLE_BATCH = DataShard()


class HiddenStateSource(Protocol):
    """Source of the hidden states H_k of frames: a cache, or the backbone. With a tuned backbone,
    the source of prompts whose hidden states are computed in each step."""

    @property
    def codec(self) -> HiddenStateCodec | None:
        """Decoder of its rows if they are codes; all sources of a run have the same."""
        ...

    def read(self, frames: IndexArray, views: IndexArray | None = None) -> list[Any]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyDataset:
    """A dataset split into training and held-out frames, with its hidden states and transforms."""

    dataset: EpisodeDataset
    hidden_states: HiddenStateSource | None
    """None for a policy that takes images."""
    transforms: RobotTransforms
    """Fitted to the training frames of all datasets of its robot."""
    train: IndexArray
    """Numbers of the training frames."""
    held_out: IndexArray
    """Numbers of the held-out frames, from other episodes than `train`."""
    embodiment: int
    """Row of its robot in the indexed weights."""


@dataclass(frozen=True)
class SampledFrames:
    """The samples of one data shard of a step."""

    datasets: IndexArray
    """[B] numbers of datasets, ascending."""
    frames: IndexArray
    """[B] frame numbers in them."""
    views: IndexArray
    """[B] numbers of augmented views; 0: the frame itself."""
    noise: Tensor
    """[B, H, D] standard normal."""
    tau: Tensor
    """[B] flow times."""
    values: float
    """Mean number of real (not padded) action values per sample of the whole step."""
    state_noise: Tensor | None = None
    """[B, max_dim] noise on the normalised state; None without noise."""


def split(
    datasets: Sequence[EpisodeDataset],
    policy: PolicyConfig,
    *,
    stride: int,
    held_out: float,
    seed: int,
    robots: Sequence[str],
    transforms: Mapping[str, RobotTransforms] | None = None,
) -> list[PolicyDataset]:
    """Split the episodes of each dataset, and fit the transforms of each robot.

    Given transforms are used instead. `robots` are in the order of their rows in the indexed
    weights. The result has no hidden states yet.
    """
    parts = [(data, *_split_frames(data, stride, held_out, seed)) for data in datasets]
    fitted = dict(transforms or {})
    for robot in {data.space.robot for data in datasets} - {*fitted}:
        mine = [(data, train) for data, train, _ in parts if data.space.robot == robot]
        fitted[robot] = _fit_robot_transforms(mine, policy)
    return [
        PolicyDataset(
            dataset=data,
            hidden_states=None,
            transforms=fitted[data.space.robot],
            train=train,
            held_out=held,
            embodiment=robots.index(data.space.robot),
        )
        for data, train, held in parts
    ]


def _split_frames(
    dataset: EpisodeDataset, stride: int, held_out: float, seed: int
) -> tuple[IndexArray, IndexArray]:
    _, held = split_episodes(dataset.num_episodes, held_out, seed)
    kept = kept_frames(dataset.starts, stride)
    is_held = np.isin(dataset.episode_index[kept], held)
    return kept[~is_held], kept[is_held]


def _fit_robot_transforms(
    parts: Sequence[tuple[EpisodeDataset, IndexArray]], policy: PolicyConfig
) -> RobotTransforms:
    """Fit transforms to these frames of the datasets of one robot."""
    rows = []
    for data, train in parts:
        ends = data.starts[data.episode_index[train] + 1]
        rows.append((data.states[train], *action_chunks(data.actions, train, ends, policy.horizon)))
    states, chunks, inside = (np.concatenate(values) for values in zip(*rows, strict=True))
    return fit_transforms(parts[0][0].space, states, chunks, inside, policy.relative)


def joint_contract(
    datasets: Sequence[EpisodeDataset],
    policy: PolicyConfig,
    *,
    cameras: tuple[str, ...],
    execute: int,
    frames: int = 1,
) -> PolicyContract:
    """Return the contract of one policy for all datasets, which sees `frames` observations.

    Raises BlmError for datasets that do not match.
    """
    if len({data.content_hash for data in datasets}) != len(datasets) or not datasets:
        raise BlmError(
            f"give one or more datasets, each only once; got {[str(data.folder) for data in datasets]}"
        )
    for data in datasets:
        data.require_known_kinds()
    spaces = dict[str, ActionSpace]()
    side, rate = datasets[0].image_size, datasets[0].space.rate_hz
    for data in datasets:
        space = spaces.setdefault(data.space.robot, data.space)
        data.require(space, cameras, side, rate)
        if (most := max(data.space.dim, data.space.state_dim)) > policy.max_dim:
            raise BlmError(
                f"'{data.space.robot}' has {most} dimensions, above policy.max_dim {policy.max_dim}; "
                f"set --policy.max-dim {most}"
            )
        if (longest := np.diff(data.starts).max()) < policy.horizon:
            raise BlmError(
                f"policy.horizon {policy.horizon} is longer than the longest episode of '{data.folder}', "
                f"{longest} steps: the last actions of a chunk would be taught by none"
            )
    return PolicyContract(
        action_spaces=spaces,
        cameras=cameras,
        image_size=side,
        horizon=policy.horizon,
        execute=execute,
        rate_hz=rate,
        frames=frames,
        training=joint_training(data.training for data in datasets),
        picture_fit=joint_fit({data.picture_fit for data in datasets}),
    )


class PolicySampler:
    """Draws the samples of each step: a dataset and task by weight, then a frame uniformly."""

    def __init__(
        self,
        datasets: Sequence[PolicyDataset],
        policy: PolicyConfig,
        *,
        batch_size: int,
        seed: int,
        weights: Mapping[str, float],
        views: int = 0,
        train: bool = True,
    ) -> None:
        """`weights` are those of PolicyTrainingConfig, `views` is the number of augmented views.

        With `train`, training frames are sampled; otherwise held-out frames, without augmentation.
        """
        self.datasets, self.policy = datasets, policy
        self.views = views if train else 0
        self.state_noise = policy.state_noise if train else 0.0
        groups = list(_groups(datasets, weights, train=train))
        if not groups:
            raise BlmError(
                "there is nothing to train on: no robot and task in the data has a weight above zero"
            )
        self.group_datasets = np.array([number for number, _, _ in groups])
        self.group_frames = [frames for _, frames, _ in groups]
        self.mixture = Mixture(
            sizes=tuple(map(len, self.group_frames)),
            weights=tuple(weight for _, _, weight in groups),
            batch_size=batch_size,
            seed=2 * seed + (not train),
        )

    def sample(self, step: int, shard: DataShard = WHOLE_BATCH) -> SampledFrames:
        """Return the samples of one data shard of a step."""
        group, chosen = self.mixture.batch(step)
        frames = np.array([self.group_frames[g][i] for g, i in zip(group, chosen, strict=True)])
        datasets = self.group_datasets[group]
        seed = np.random.SeedSequence([self.mixture.seed, step]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        count = len(datasets)
        noise = torch.randn((count, self.policy.horizon, self.policy.max_dim), generator=generator)
        tau = sample_time(count, generator)
        views = np.random.default_rng((self.mixture.seed, step, 1)).integers(self.views + 1, size=count)
        values = sum(self._count_values(i, frames[datasets == i]) for i in np.unique(datasets))
        mine = np.arange(count)[shard.index :: shard.count]
        return SampledFrames(
            datasets[mine],
            frames[mine],
            views[mine],
            noise[mine],
            tau[mine],
            values / count,
            self._draw_state_noise(step, count)[mine] if self.state_noise else None,
        )

    def _draw_state_noise(self, step: int, count: int) -> Tensor:
        """Return Gaussian noise [count, D], a function of seed and step."""
        rng = np.random.default_rng((self.mixture.seed, step, 2))
        noise = rng.normal(scale=self.state_noise, size=(count, self.policy.max_dim))
        return torch.from_numpy(noise.astype(np.float32))

    def vectors(self, samples: SampledFrames) -> ActionBatch:
        """Return the batch without hidden states."""
        numbers = np.unique(samples.datasets)
        parts = [self._vectors(i, samples.frames[samples.datasets == i]) for i in numbers]
        state, actions, real, measured = (torch.cat(values) for values in zip(*parts, strict=True))
        if samples.state_noise is not None:
            state = state + samples.state_noise * measured  # none on padding
        where = zip(samples.datasets, samples.frames, strict=True)
        embodiments = [self.datasets[i].embodiment for i in samples.datasets]
        return ActionBatch(
            state=state,
            actions=actions,
            real=real.bool(),
            embodiment=torch.tensor(embodiments),
            runs=runs_of(embodiments),
            noise=samples.noise,
            tau=samples.tau,
            ids=[(str(self.datasets[i].dataset.folder), int(frame)) for i, frame in where],
            values=samples.values,
        )

    def __call__(self, step: int, shard: DataShard = WHOLE_BATCH) -> PolicyBatch:
        """Return the batch of a data shard, with hidden states now and `future_steps` ahead."""
        samples = self.sample(step, shard)
        now, future = self.read(samples)
        first = self.datasets[0].hidden_states
        hidden, mask = collate(now)
        future_hidden, future_mask = collate(future or now)
        return PolicyBatch(
            hidden=hidden,
            mask=mask,
            future_hidden=future_hidden,
            future_mask=future_mask,
            codec=first.codec if first is not None else None,
            **vars(self.vectors(samples)),
        )

    def future_frames(self, samples: SampledFrames) -> IndexArray:
        """Return the frames [B] `future_steps` after those of the samples, or the last of the episode."""
        numbers = np.unique(samples.datasets)
        return np.concatenate([self._later(i, samples.frames[samples.datasets == i]) for i in numbers])

    def _later(self, index: int, frames: IndexArray) -> IndexArray:
        data = self.datasets[index].dataset
        ends = data.starts[data.episode_index[frames] + 1]
        return np.minimum(frames + self.policy.future_steps, ends - 1)

    def read(self, samples: SampledFrames) -> tuple[list[Any], list[Any]]:
        """Return what the source has of the frames, and of those `future_steps` ahead; the latter
        are empty without the future-prediction loss."""
        now, future = list[Any](), list[Any]()
        for number in np.unique(samples.datasets):
            mine, source = samples.datasets == number, self.datasets[number]
            assert source.hidden_states is not None, "this sampler was created for a policy that takes images"
            frames = samples.frames[mine]
            now += source.hidden_states.read(frames, samples.views[mine])
            if self.policy.future_weight:
                future += source.hidden_states.read(self._later(number, frames))
        return now, future

    def _count_values(self, index: int, frames: IndexArray) -> float:
        """Count the real action values in the chunks of these frames of one dataset."""
        data = self.datasets[index].dataset
        left = data.starts[data.episode_index[frames] + 1] - frames
        return float(np.minimum(left, self.policy.horizon).sum() * data.space.dim)

    def _vectors(self, index: int, frames: IndexArray) -> tuple[Tensor, ...]:
        """Return state [B, S], actions [B, H, D], mask [B, H, D] and mask of the state [B, S] of
        frames of a dataset, all padded."""
        source, policy = self.datasets[index], self.policy
        data = source.dataset
        ends, states = data.starts[data.episode_index[frames] + 1], data.states[frames]
        chunks, inside = action_chunks(data.actions, frames, ends, policy.horizon)
        values = (
            source.transforms.state.forward(states),
            source.transforms.actions.forward(chunks, states),
            np.broadcast_to(inside[..., None], chunks.shape).astype(np.float32),
            np.ones_like(states),
        )
        return tuple(pad_dims(value, policy.max_dim) for value in values)


def anything_held_out(datasets: Sequence[PolicyDataset], weights: Mapping[str, float]) -> bool:
    """Return whether any held-out frame has a weight above 0.

    With few episodes there may be none.
    """
    return any(True for _ in _groups(datasets, weights, train=False))


def _groups(
    datasets: Sequence[PolicyDataset], weights: Mapping[str, float], *, train: bool
) -> Iterator[tuple[int, IndexArray, float]]:
    """Yield dataset number, frames and weight of each dataset and task, by dataset."""
    known = {source.dataset.space.robot for source in datasets}
    known |= {task for source in datasets for task in source.dataset.tasks}
    if unknown := sorted({*weights} - known):
        raise BlmError(f"weights for {unknown}, which no dataset contains; valid: {', '.join(sorted(known))}")
    for number, source in enumerate(datasets):
        data = source.dataset
        frames = source.train if train else source.held_out
        tasks = np.asarray(data.tasks)[data.episode_index[frames]]
        for task in sorted({*tasks.tolist()}):
            mine = frames[tasks == task]
            weight = len(mine) * weights.get(data.space.robot, 1.0) * weights.get(task, 1.0)
            if weight > 0:
                yield number, mine, weight


def warn_of_reserved(datasets: Sequence[EpisodeDataset]) -> dict[str, dict[str, dict[str, int]]]:
    """Warn of datasets with scenes of reserved seeds; return the provenance to store.

    That is {"reserved_seeds": {folder: {purpose: episodes}}}, or {} if there are none.
    """
    found = {str(data.folder): counts for data in datasets if (counts := data.reserved_seeds)}
    for folder, counts in found.items():
        Console(stderr=True).print(f"warning: {reserved_seeds_warning(folder, counts)}", soft_wrap=True)
    return {"reserved_seeds": found} if found else {}


def require_weights(weights: Mapping[str, float]) -> None:
    """Raise BlmError for a weight that is negative or not finite."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise BlmError(f"the weight of '{name}' is {weight}; it must be 0 (never) or more")
