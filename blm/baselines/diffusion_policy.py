"""Diffusion Policy, trained from scratch on the same demonstrations, with its own eyes: the baseline.

Its noise schedule is the one of the paper, from `diffusers` (extra `baselines`): 100 squared-cosine steps in
training, DDIM in control. Data, normalisation, action chunks, averaging of weights and evaluation are BLM's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from blm.baselines.network import DiffusionConfig, DiffusionNetwork, words_of
from blm.datasets.lerobot import open_dataset
from blm.datasets.transforms import RobotTransforms
from blm.policy.checkpoint import identified, read_config, read_transforms, require_free, write_checkpoint
from blm.policy.flow import seeded_noise
from blm.policy.network import PolicyConfig
from blm.policy.policy import decode, pad_dims
from blm.training.loop.distributed import Part
from blm.training.loop.loop import Ema, LoopConfig, Piece, run_loop
from blm.training.policy.hidden_states import claim
from blm.training.policy.sampler import Sampler, joint_contract, require_weights, split, warn_of_reserved
from blm.types import ActionChunk, BlmError, ImageArray, Observation, PolicyContract, require_numbers

KIND = "diffusion_policy"
HELD_OUT = 0.05
"""Fraction of the episodes that Stage II keeps from training by default; the same are kept here."""


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Training of a Diffusion Policy."""

    datasets: tuple[Path, ...]
    """Dataset folders, one or several a robot."""
    cameras: tuple[str, ...]
    loop: LoopConfig
    network: DiffusionConfig = field(default_factory=DiffusionConfig)
    actions: PolicyConfig = field(default_factory=PolicyConfig)
    """Of it: horizon, max_dim, relative and ema."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """As in Stage II."""
    execute: int = 8
    stride: int = 1
    """Learn from every n-th frame."""

    def __post_init__(self) -> None:
        require_numbers(self, stride=(1, 1_000_000))
        require_weights(self.weights)
        if not 1 <= self.execute <= self.actions.horizon:
            raise BlmError(f"execute {self.execute} must lie in 1..horizon = {self.actions.horizon}")


def scheduler(config: DiffusionConfig) -> Any:
    """Return the noise schedule. Raises BlmError without `diffusers`."""
    try:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    except ImportError as error:
        raise BlmError(
            "the Diffusion Policy baseline needs diffusers: pip install 'blm[baselines]'"
        ) from error
    return DDIMScheduler(
        num_train_timesteps=config.train_steps,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="epsilon",
        clip_sample=True,
        clip_sample_range=1.5,  # actions are normalised to about -1 .. 1, outliers beyond
    )


@dataclass(frozen=True)
class Batch:
    pictures: tuple[ImageArray, ...]
    """[B, side, side, 3] of each camera."""
    words: tuple[Tensor, ...]
    steps: Tensor
    """[B] diffusion steps."""
    vectors: Mapping[str, Any]
    """As `Sampler.vectors` gives them."""


class DiffusionPolicy:
    """A `Policy`."""

    def __init__(
        self, network: DiffusionNetwork, transforms: Mapping[str, RobotTransforms], contract: PolicyContract
    ) -> None:
        self.network, self.transforms = network.eval().requires_grad_(False), dict(transforms)
        self.contract = identified(contract, network, self.transforms)
        self.scheduler = scheduler(network.config)

    @property
    def device(self) -> str:
        return str(next(self.network.parameters()).device)

    def reset(self) -> None:
        """Nothing to forget."""

    def act(self, observation: Observation) -> ActionChunk:
        return self.act_batch([observation])[0]

    @torch.no_grad()
    def act_batch(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """Return one chunk of absolute targets per observation; see `CheckpointPolicy.act_batch`."""
        seen = [self.contract.check(observation) for observation in observations]
        robots, device = list(self.contract.action_spaces), self.device
        dim = self.network.dim
        state = torch.stack([pad_dims(self.transforms[o.robot].state.forward(o.state), dim) for o in seen])
        condition = self.network.look(
            [pixels(np.stack([o.images[c] for o in seen])).to(device) for c in self.contract.cameras],
            state.to(device),
            [words_of(o.instruction, self.network.config.words) for o in seen],
            torch.tensor([robots.index(o.robot) for o in seen], device=device),
        )
        x = seeded_noise([o.seed for o in seen], (self.contract.horizon, dim)).to(device)
        steps = copy.deepcopy(self.scheduler)
        steps.set_timesteps(self.network.config.sampler_steps)
        for step in steps.timesteps.tolist():
            noise = self.network.unet(x, torch.full((len(x),), float(step), device=device), condition)
            x = steps.step(noise, step, x).prev_sample
        return decode(self.contract, self.transforms, seen, x)

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
        """Read a checkpoint. Raises BlmError, naming file and fix, unless it is whole and unaltered."""
        folder = Path(folder)
        config = read_config(folder)
        contract = PolicyContract.from_json(config["contract"])
        sizes = DiffusionConfig(**{**config["network"], "widths": tuple(config["network"]["widths"])})
        network = DiffusionNetwork(sizes, contract.cameras, len(contract.action_spaces), config["dim"])
        network.load_state_dict(load_file(folder / "policy.safetensors"))
        return cls(network.to(device), read_transforms(folder), contract)


def pixels(pictures: ImageArray) -> Tensor:
    """[B, side, side, 3] uint8 -> [B, 3, side, side] in -1 .. 1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_baseline(config: BaselineConfig, out: Path, provenance: Mapping[str, Any]) -> Path:
    """Train, log to `out/log.jsonl`, write and return the folder `out/checkpoint`; a killed run continues."""
    datasets = [open_dataset(folder) for folder in config.datasets]
    contract = joint_contract(datasets, config.actions, cameras=config.cameras, execute=config.execute)
    schedule, seed = scheduler(config.network), config.loop.seed
    names = list(contract.action_spaces)
    robots = split(datasets, config.actions, stride=config.stride, held_out=HELD_OUT, seed=seed, robots=names)
    facts = {"config": {**asdict(config), "loop": None}, "data": [data.content_hash for data in datasets]}
    provenance = {**provenance, **warn_of_reserved(datasets)}
    require_free(out / "checkpoint")
    claim(out / "inputs.json", {k: str(v) for k, v in facts.items()}, f"'{out}' holds another run")
    loop = config.loop
    sampler = Sampler(
        robots, config.actions, batch_size=loop.batch_size, seed=loop.seed, weights=config.weights
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(loop.seed)
        network = DiffusionNetwork(config.network, config.cameras, len(names), config.actions.max_dim)
    ema = Ema(network, config.actions.ema)

    def next_batch(step: int, part: Part) -> Piece[Batch]:
        draw = sampler.draw(step, part)
        pictures, words = list[list[ImageArray]](), list[Tensor]()
        for number in np.unique(draw.robots):
            data, frames = robots[number].dataset, draw.frames[draw.robots == number]
            pictures.append([data.frames(frames, camera) for camera in config.cameras])
            texts = (data.instructions[task] for task in data.task_index[frames])
            words += [words_of(text, config.network.words) for text in texts]
        vectors = sampler.vectors(draw)
        joined = tuple(np.concatenate(views) for views in zip(*pictures, strict=True))
        rng = np.random.default_rng((loop.seed, step, 2))
        steps = torch.from_numpy(rng.integers(config.network.train_steps, size=loop.batch_size))
        mine = steps[part.index :: part.count]
        return Piece(Batch(joined, tuple(words), mine, vectors), vectors["ids"], weight=len(words))

    def loss(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        v = batch.vectors
        actions, noise, real = v["actions"] * v["real"], v["noise"] * v["real"], v["real"]
        noisy = schedule.add_noise(actions, noise, batch.steps) * real
        condition = network.look(
            [pixels(p) for p in batch.pictures], v["state"], batch.words, v["embodiment"]
        )
        error = (network.unet(noisy, batch.steps.float(), condition) - noise).square() * real
        return error.sum() / (v["values"] * len(actions)), {}

    run_loop(network, loss, next_batch, loop, out, ema=ema)
    fitted = {robot.dataset.space.robot: robot.transforms for robot in robots}
    policy = DiffusionPolicy(cast(DiffusionNetwork, ema.module), fitted, contract)
    policy.save(out / "checkpoint", {**provenance, "loop": asdict(loop)})
    return out / "checkpoint"
