"""The baseline: a Diffusion Policy (Chi et al., RSS 2023), trained on the same demonstrations.

It is trained from scratch. Its noise schedule is that of the paper, from `diffusers` (extra
`baselines`): 100 squared-cosine steps in training, DDIM in control. Data, normalisation, action
chunks, EMA and evaluation are those of BLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from blm.baselines.network import DiffusionConfig, DiffusionNetwork, bag_of_words
from blm.datasets.decoding import decode_chunks
from blm.datasets.lerobot import open_mapped, stated_mappings
from blm.datasets.transforms import RobotTransforms
from blm.policy.checkpoint import (
    read_config,
    read_transforms,
    require_free,
    with_hashes,
    write_checkpoint,
)
from blm.policy.codec import pad_dims
from blm.policy.flow import seeded_noise
from blm.policy.network import ActionBatch, PolicyConfig
from blm.policy.unet import denoise, noise_scheduler
from blm.training.loop.batches import Microbatch
from blm.training.loop.distributed import DataShard
from blm.training.loop.ema import Ema
from blm.training.loop.loop import LoopConfig, run_loop
from blm.training.policy.sampler import (
    PolicySampler,
    joint_contract,
    require_weights,
    split,
    warn_of_reserved,
)
from blm.training.run_inputs import require_same_inputs
from blm.types import ActionChunk, BlmError, ImageArray, Observation, PolicyContract, require_numbers

KIND = "diffusion_policy"
HELD_OUT = 0.05
"""Fraction of the episodes that are held out, as in Stage II by default, and the same episodes."""


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Training of a Diffusion Policy."""

    datasets: tuple[Path, ...]
    """Dataset folders, at least one per robot."""
    mappings: tuple[Path, ...] = ()
    """Mappings of datasets of other programs: one for all, or one for each; - for none."""
    cameras: tuple[str, ...]
    """Cameras whose images the policy sees."""
    loop: LoopConfig
    """Training loop."""
    network: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Size of the networks."""
    actions: PolicyConfig = field(default_factory=PolicyConfig)
    """Encoding of actions; only horizon, max_dim, relative and ema are used."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Sampling weights of frames, as pairs of a robot's or task's name and a number.
    The default weight is 1; frames of weight 0 are never sampled."""
    execute: int = 8
    """Number of actions of a chunk to execute before the next observation."""
    stride: int = 1
    """Train on every n-th frame."""

    def __post_init__(self) -> None:
        require_numbers(self, stride=(1, 1_000_000))
        require_weights(self.weights)
        if not 1 <= self.execute <= self.actions.horizon:
            raise BlmError(f"execute {self.execute} must lie in 1..horizon = {self.actions.horizon}")


@dataclass(frozen=True)
class Batch:
    """A training batch of one process."""

    pictures: tuple[ImageArray, ...]
    """[B, side, side, 3] uint8, of each camera."""
    words: tuple[Tensor, ...]
    """Bag of words of each instruction."""
    steps: Tensor
    """[B] diffusion steps."""
    vectors: ActionBatch
    """The result of `PolicySampler.vectors`."""


class DiffusionPolicy:
    """A `Policy` without a language model."""

    def __init__(
        self, network: DiffusionNetwork, transforms: Mapping[str, RobotTransforms], contract: PolicyContract
    ) -> None:
        self.network, self.transforms = network.eval().requires_grad_(False), dict(transforms)
        self.contract = with_hashes(contract, network, self.transforms)
        self.scheduler = noise_scheduler(network.config.train_steps)

    @property
    def device(self) -> str:
        return str(next(self.network.parameters()).device)

    def reset(self) -> None:
        """Do nothing: a chunk depends on its observation alone."""

    def act(self, observation: Observation) -> ActionChunk:
        """Return the chunk for one observation; see `act_batch`."""
        return self.act_batch([observation])[0]

    @torch.no_grad()
    def act_batch(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """Return one chunk of absolute targets per observation; see
        `CheckpointPolicy.act_batch`."""
        checked = [self.contract.check(observation) for observation in observations]
        robots, device = list(self.contract.action_spaces), self.device
        dim = self.network.dim
        state = torch.stack([pad_dims(self.transforms[o.robot].state.forward(o.state), dim) for o in checked])
        condition = self.network.encode_condition(
            [pixels(np.stack([o.images[c] for o in checked])).to(device) for c in self.contract.cameras],
            state.to(device),
            [bag_of_words(o.instruction, self.network.config.words) for o in checked],
            torch.tensor([robots.index(o.robot) for o in checked], device=device),
        )
        x = seeded_noise([o.seed for o in checked], (self.contract.horizon, dim)).to(device)

        def predict(noisy: Tensor, steps: Tensor) -> Tensor:
            return self.network.unet(noisy, steps, condition)

        x = denoise(predict, x, self.scheduler, self.network.config.sampler_steps)
        return decode_chunks(self.contract, self.transforms, checked, x.double().cpu().numpy())

    def save(self, folder: Path, provenance: Mapping[str, Any]) -> None:
        config = {
            "kind": KIND,
            "network": asdict(self.network.config),
            "dim": self.network.dim,
            "contract": self.contract.to_json(),
            "provenance": dict(provenance),
        }
        write_checkpoint(folder, config, self.network.state_dict(), self.transforms)

    @classmethod
    def load(cls, folder: Path | str, *, device: str = "cpu") -> DiffusionPolicy:
        """Read a checkpoint. Raises BlmError, which names file and fix, for a damaged one."""
        folder = Path(folder)
        config = read_config(folder)
        contract = PolicyContract.from_json(config["contract"])
        sizes = DiffusionConfig(**{**config["network"], "widths": tuple(config["network"]["widths"])})
        network = DiffusionNetwork(sizes, contract.cameras, len(contract.action_spaces), config["dim"])
        network.load_state_dict(load_file(folder / "policy.safetensors"))
        return cls(network.to(device), read_transforms(folder), contract)


def _read_batch(
    sampler: PolicySampler, config: BaselineConfig, step: int, shard: DataShard
) -> Microbatch[Batch]:
    """Return the part of one process of the batch of a training step."""
    samples = sampler.sample(step, shard)
    pictures = list[list[ImageArray]]()
    words = list[Tensor]()
    for number in np.unique(samples.datasets):
        data = sampler.datasets[number].dataset
        frames = samples.frames[samples.datasets == number]
        pictures.append([data.frames(frames, camera) for camera in config.cameras])
        texts = (data.instructions[task] for task in data.task_index[frames])
        words += [bag_of_words(text, config.network.words) for text in texts]
    vectors = sampler.vectors(samples)
    joined = tuple(np.concatenate(views) for views in zip(*pictures, strict=True))
    rng = np.random.default_rng((config.loop.seed, step, 2))
    steps = torch.from_numpy(rng.integers(config.network.train_steps, size=config.loop.batch_size))
    batch = Batch(joined, tuple(words), steps[shard.index :: shard.count], vectors)
    return Microbatch(batch, vectors.ids, weight=len(words))


def pixels(pictures: ImageArray) -> Tensor:
    """Convert images [B, side, side, 3] uint8 to [B, 3, side, side] in -1 .. 1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_baseline(config: BaselineConfig, out: Path, provenance: Mapping[str, Any]) -> Path:
    """Train a Diffusion Policy and return the folder `out/checkpoint`; a killed run resumes.

    Logs to `out/log.jsonl`.
    """
    datasets = open_mapped(config.datasets, config.mappings)
    contract = joint_contract(datasets, config.actions, cameras=config.cameras, execute=config.execute)
    schedule = noise_scheduler(config.network.train_steps)
    names = list(contract.action_spaces)
    opened = split(
        datasets,
        config.actions,
        stride=config.stride,
        held_out=HELD_OUT,
        seed=config.loop.seed,
        robots=names,
    )
    facts = {"config": {**asdict(config), "loop": None}, "data": [data.content_hash for data in datasets]}
    provenance = {**provenance, **stated_mappings(datasets), **warn_of_reserved(datasets)}
    require_free(out / "checkpoint")
    inputs = {name: str(value) for name, value in facts.items()}
    require_same_inputs(out / "inputs.json", inputs, f"'{out}' holds another run")
    loop = config.loop
    sampler = PolicySampler(
        opened, config.actions, batch_size=loop.batch_size, seed=loop.seed, weights=config.weights
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(loop.seed)
        network = DiffusionNetwork(config.network, config.cameras, len(names), config.actions.max_dim)
    ema = Ema(network, config.actions.ema)

    def next_batch(step: int, shard: DataShard) -> Microbatch[Batch]:
        return _read_batch(sampler, config, step, shard)

    def loss(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        v = batch.vectors
        actions, noise, real = v.actions * v.real, v.noise * v.real, v.real
        noisy = schedule.add_noise(actions, noise, batch.steps) * real
        condition = network.encode_condition(
            [pixels(p) for p in batch.pictures], v.state, batch.words, v.embodiment
        )
        error = (network.unet(noisy, batch.steps.float(), condition) - noise).square() * real
        return error.sum() / (v.values * len(actions)), {}

    run_loop(network, loss, next_batch, loop, out, ema=ema)
    fitted = {one.dataset.space.robot: one.transforms for one in opened}
    policy = DiffusionPolicy(cast(DiffusionNetwork, ema.module), fitted, contract)
    policy.save(out / "checkpoint", {**provenance, "loop": asdict(loop)})
    return out / "checkpoint"
