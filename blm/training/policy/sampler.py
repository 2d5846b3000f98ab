"""Which demonstrations a step of Stage II learns from, and their vectors.

A draw is a function of (seed, step) alone, noise and times included; the parts of a step, on several
processes or one after the other, are together the samples of the whole.
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
from blm.policy.flow import sample_time
from blm.policy.network import PolicyBatch, PolicyConfig
from blm.policy.policy import pad_dims
from blm.seeds import reserved_seeds_warning
from blm.training.loop.distributed import Part
from blm.training.policy.hidden_states import Rows, collate
from blm.types import ActionSpace, BlmError, PolicyContract

WHOLE = Part()


class Intents(Protocol):
    """Where H_k of frames comes from: a cache, or the backbone."""

    def rows(self, frames: IndexArray, views: IndexArray | None = None) -> Rows: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyDataset:
    """What one dataset contributes: its episodes are split; its robot's transforms fit the training parts."""

    dataset: EpisodeDataset
    intents: Intents | None
    """None: the policy reads the pictures themselves."""
    transforms: RobotTransforms
    train: IndexArray
    """Frame numbers."""
    held_out: IndexArray
    """Frame numbers, of other episodes."""
    embodiment: int
    """Number of its row in the indexed weights."""


@dataclass(frozen=True)
class Draw:
    """The samples of one part of a step."""

    robots: IndexArray
    """[B] numbers of datasets, ascending."""
    frames: IndexArray
    """[B] frames in them."""
    views: IndexArray
    """[B] augmented views; 0: the frame as it is."""
    noise: Tensor
    """[B, H, D] standard normal."""
    tau: Tensor
    """[B] flow times."""
    values: float
    """Real values of a sample, on average over the whole step."""


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
    """Split the episodes of each dataset; fit a robot's transforms, unless they are given, to all of its.

    `robots` are in the order of their rows in the indexed weights. The result has no intents.
    """
    parts = [(data, *_split_frames(data, stride, held_out, seed)) for data in datasets]
    fitted = dict(transforms or {})
    for robot in {data.space.robot for data in datasets} - {*fitted}:
        mine = [(data, train) for data, train, _ in parts if data.space.robot == robot]
        fitted[robot] = _fit(mine, policy)
    return [
        PolicyDataset(
            dataset=data,
            intents=None,
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


def _fit(parts: Sequence[tuple[EpisodeDataset, IndexArray]], policy: PolicyConfig) -> RobotTransforms:
    """Fit transforms to these frames of one robot's datasets."""
    rows = []
    for data, train in parts:
        ends = data.starts[data.episode_index[train] + 1]
        rows.append((data.states[train], *action_chunks(data.actions, train, ends, policy.horizon)))
    states, chunks, inside = (np.concatenate(values) for values in zip(*rows, strict=True))
    return fit_transforms(parts[0][0].space, states, chunks, inside, policy.relative)


def joint_contract(
    datasets: Sequence[EpisodeDataset], policy: PolicyConfig, *, cameras: tuple[str, ...], execute: int
) -> PolicyContract:
    """Return the contract of one policy for all. Raises BlmError for datasets that do not go together."""
    if len({data.content_hash for data in datasets}) != len(datasets) or not datasets:
        raise BlmError(f"give datasets, each once; got {[str(data.folder) for data in datasets]}")
    spaces = dict[str, ActionSpace]()
    side, rate = datasets[0].image_size, datasets[0].space.rate_hz
    for data in datasets:
        space = spaces.setdefault(data.space.robot, data.space)
        data.require(space, cameras, side, rate)
        if data.space.dim > policy.max_dim:
            raise BlmError(f"'{data.space.robot}' has {data.space.dim} dimensions, above policy.max_dim")
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
    )


class Sampler:
    """Draws the samples of each step: a robot and task by weight, then one of their frames."""

    def __init__(
        self,
        robots: Sequence[PolicyDataset],
        policy: PolicyConfig,
        *,
        batch_size: int,
        seed: int,
        weights: Mapping[str, float],
        views: int = 0,
        train: bool = True,
    ) -> None:
        """`weights` as in PolicyTrainingConfig; `views`: augmented ones; `train`: else held out."""
        self.robots, self.policy, self.views = robots, policy, views if train else 0
        groups = list(_groups(robots, weights, train=train))
        if not groups:
            raise BlmError("nothing to learn from: no robot and task in the data has a weight above zero")
        self.robot = np.array([robot for robot, _, _ in groups])
        self.frames = [frames for _, frames, _ in groups]
        self.mixture = Mixture(
            sizes=tuple(map(len, self.frames)),
            weights=tuple(weight for _, _, weight in groups),
            batch_size=batch_size,
            seed=2 * seed + (not train),
        )

    def draw(self, step: int, part: Part = WHOLE) -> Draw:
        group, chosen = self.mixture.batch(step)
        frames = np.array([self.frames[g][i] for g, i in zip(group, chosen, strict=True)])
        robots = self.robot[group]
        seed = np.random.SeedSequence([self.mixture.seed, step]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        noise = torch.randn((len(robots), self.policy.horizon, self.policy.max_dim), generator=generator)
        tau = sample_time(len(robots), generator)
        views = np.random.default_rng((self.mixture.seed, step, 1)).integers(self.views + 1, size=len(robots))
        values = sum(self._values(i, frames[robots == i]) for i in np.unique(robots))
        mine = np.arange(len(robots))[part.index :: part.count]
        return Draw(robots[mine], frames[mine], views[mine], noise[mine], tau[mine], values / len(robots))

    def vectors(self, draw: Draw) -> dict[str, Any]:
        """The fields of a PolicyBatch that need no picture."""
        parts = [self._vectors(i, draw.frames[draw.robots == i]) for i in np.unique(draw.robots)]
        state, actions, real = (torch.cat(values) for values in zip(*parts, strict=True))
        where = zip(draw.robots, draw.frames, strict=True)
        return {
            "state": state,
            "actions": actions,
            "real": real.bool(),
            "embodiment": torch.tensor([self.robots[i].embodiment for i in draw.robots]),
            "noise": draw.noise,
            "tau": draw.tau,
            "ids": [(str(self.robots[i].dataset.folder), int(frame)) for i, frame in where],
            "values": draw.values,
        }

    def __call__(self, step: int, part: Part = WHOLE) -> PolicyBatch:
        """Return one part of the batch of a step, with hidden states now and in the future."""
        draw = self.draw(step, part)
        now, later = list[Any](), list[Any]()
        for number in np.unique(draw.robots):
            mine, robot = draw.robots == number, self.robots[number]
            assert robot.intents is not None, "this sampler was made for pictures"
            frames = draw.frames[mine]
            now += robot.intents.rows(frames, draw.views[mine])
            if self.policy.future_weight:
                ends = robot.dataset.starts[robot.dataset.episode_index[frames] + 1]
                later += robot.intents.rows(np.minimum(frames + self.policy.future_steps, ends - 1))
        hidden, mask = collate(now)
        future_hidden, future_mask = collate(later or now)
        return PolicyBatch(
            hidden=hidden,
            mask=mask,
            future_hidden=future_hidden,
            future_mask=future_mask,
            **self.vectors(draw),
        )

    def _values(self, index: int, frames: IndexArray) -> float:
        """Real values in the action chunks of one robot's frames."""
        data = self.robots[index].dataset
        left = data.starts[data.episode_index[frames] + 1] - frames
        return float(np.minimum(left, self.policy.horizon).sum() * data.space.dim)

    def _vectors(self, index: int, frames: IndexArray) -> tuple[Tensor, ...]:
        """State, actions, and what is real in them, of one robot's frames."""
        robot, policy = self.robots[index], self.policy
        data = robot.dataset
        ends, states = data.starts[data.episode_index[frames] + 1], data.states[frames]
        chunks, inside = action_chunks(data.actions, frames, ends, policy.horizon)
        values = (
            robot.transforms.state.forward(states),
            robot.transforms.actions.forward(chunks, states),
            np.broadcast_to(inside[..., None], chunks.shape).astype(np.float32),
        )
        return tuple(pad_dims(value, policy.max_dim) for value in values)


def anything_held_out(robots: Sequence[PolicyDataset], weights: Mapping[str, float]) -> bool:
    """Whether any held-out frame has a weight: few episodes may hold out none of what is trained."""
    return any(True for _ in _groups(robots, weights, train=False))


def _groups(
    robots: Sequence[PolicyDataset], weights: Mapping[str, float], *, train: bool
) -> Iterator[tuple[int, IndexArray, float]]:
    """Yield number of the robot, frames and weight of each robot and task; robots come in order."""
    known = {robot.dataset.space.robot for robot in robots} | {t for r in robots for t in r.dataset.tasks}
    if unknown := sorted({*weights} - known):
        raise BlmError(f"weights for {unknown}, which no dataset holds; valid: {', '.join(sorted(known))}")
    for number, robot in enumerate(robots):
        data, frames = robot.dataset, robot.train if train else robot.held_out
        tasks = np.asarray(data.tasks)[data.episode_index[frames]]
        for task in sorted({*tasks.tolist()}):
            mine = frames[tasks == task]
            weight = len(mine) * weights.get(data.space.robot, 1.0) * weights.get(task, 1.0)
            if weight > 0:
                yield number, mine, weight


def warn_of_reserved(datasets: Sequence[EpisodeDataset]) -> dict[str, Any]:
    """Print a warning for each dataset with scenes that are reserved; return what a checkpoint says of them.

    That is {"reserved_seeds": {folder: {purpose: episodes}}}, or nothing if there are none.
    """
    found = {str(data.folder): counts for data in datasets if (counts := data.reserved_seeds)}
    for folder, counts in found.items():
        Console(stderr=True).print(f"warning: {reserved_seeds_warning(folder, counts)}", soft_wrap=True)
    return {"reserved_seeds": found} if found else {}


def require_weights(weights: Mapping[str, float]) -> None:
    """Raise BlmError for a weight that is not a number from 0 on."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise BlmError(f"the weight of '{name}' is {weight}; it must be 0 (never) or more")
