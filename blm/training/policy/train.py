"""Stage II: train bridge and policy on demonstrations, with the backbone frozen, and prove that it was.

One joint model for several robots, each with one row in the indexed weights. With a cache of intents the
backbone is in memory only before the first step and after the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blm.backbone.backbone import Backbone
from blm.datasets.lerobot import EpisodeDataset, open_dataset
from blm.io import replacing
from blm.policy.checkpoint import require_free
from blm.policy.network import PolicyBatch, PolicyConfig, PolicyNetwork
from blm.policy.policy import CheckpointPolicy, FrozenProof
from blm.training.loop.distributed import Part, Processes
from blm.training.loop.loop import Ema, LoopConfig, Piece, run_loop
from blm.training.policy.add_robot import Start, continued, fresh
from blm.training.policy.hidden_states import (
    HiddenStateConfig,
    LiveHiddenStates,
    cache_hidden_states,
    claim,
    describe,
)
from blm.training.policy.sampler import (
    Intents,
    PolicyDataset,
    Sampler,
    anything_held_out,
    joint_contract,
    require_weights,
    split,
    warn_of_reserved,
)
from blm.types import BlmError, PolicyContract, require_numbers


@dataclass(frozen=True, kw_only=True)
class PolicyTrainingConfig:
    """All of Stage II."""

    datasets: tuple[Path, ...]
    """Dataset folders, one or several a robot (demonstrations, corrections)."""
    backbone: str
    """Folder that Stage I wrote, or a name of BACKBONES."""
    intents: HiddenStateConfig
    loop: LoopConfig
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    cache: Path | None = None
    """Folder for the intent caches, one a dataset, shared by runs; None: compute H_k for every batch anew."""
    start: Path | None = None
    """Checkpoint to go on from, with its robots or with further ones; None: random weights."""
    only_new: bool = False
    """Train nothing but the rows of robots that the checkpoint does not know."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Robot or task -> how many times as often as others its frames are drawn; 0: never."""
    execute: int = 8
    """Actions of a chunk to execute before asking again; stored in the contract."""
    held_out: float = 0.05
    """Fraction of the episodes of each dataset kept for the validation loss; 0: none."""
    validation_batches: int = 8
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the backbone."""

    def __post_init__(self) -> None:
        require_numbers(self, held_out=(0, 0.9), validation_batches=(0, 1_000_000))
        require_weights(self.weights)
        if self.only_new and self.start is None:
            raise BlmError("only_new needs a checkpoint to start from")
        if not 1 <= self.execute <= self.policy.horizon:
            raise BlmError(f"execute {self.execute} must lie in 1..horizon = {self.policy.horizon}")
        stride, steps = self.intents.stride, self.policy.future_steps
        if steps % stride:
            raise BlmError(f"stride {stride} of the intents must divide future_steps = {steps}")


def open_robots(
    backbone: Backbone, datasets: Sequence[EpisodeDataset], config: PolicyTrainingConfig, start: Start
) -> list[PolicyDataset]:
    """Split the episodes, fit the transforms, and fill the caches of intents, if wanted."""
    robots = split(
        datasets,
        config.policy,
        stride=config.intents.stride,
        held_out=config.held_out,
        seed=config.loop.seed,
        robots=start.robots,
        transforms=start.transforms(),
    )
    return [
        replace(robot, intents=_intents(backbone, robot.dataset, config, name))
        for robot, name in zip(robots, cache_names(datasets), strict=True)
    ]


def _intents(backbone: Backbone, dataset: EpisodeDataset, config: PolicyTrainingConfig, name: str) -> Intents:
    if config.cache is None:
        return LiveHiddenStates(backbone, dataset, config.intents)
    return cache_hidden_states(backbone, config.backbone, dataset, config.intents, config.cache / name)


def cache_names(datasets: Sequence[EpisodeDataset]) -> list[str]:
    """Return "panda" for the first dataset of a robot, then "panda-2", .."""
    names = [data.space.robot for data in datasets]
    counts = (names[: place + 1].count(name) for place, name in enumerate(names))
    return [name if count == 1 else f"{name}-{count}" for name, count in zip(names, counts, strict=True)]


def sampler_of(
    robots: Sequence[PolicyDataset], config: PolicyTrainingConfig, *, train: bool = True
) -> Sampler:
    return Sampler(
        robots,
        config.policy,
        batch_size=config.loop.batch_size,
        seed=config.loop.seed,
        weights=config.weights,
        views=config.intents.views,
        train=train,
    )


Drive = Callable[[int, CheckpointPolicy], Mapping[str, float]]
"""What a policy does after so many steps: "success" (0..1), and what else shall be logged."""


def train_stage2(
    config: PolicyTrainingConfig, out: Path, provenance: Mapping[str, Any], *, drive: Drive | None = None
) -> Path:
    """Train, log to `out/log.jsonl`, write and return the folder `out/checkpoint`; a killed run continues.

    `out/best` is the checkpoint of the evaluation with the highest success of `drive`, which then needs the
    backbone in memory, or without it with the lowest validation loss. `provenance` (the command, for
    instance) is stored in both, and below "start" that of the checkpoint that training went on from. Raises
    BlmError if datasets and config do not fit together, and if the backbone is not bit for bit what it was.
    """
    processes = Processes.join(config.device)
    config = replace(config, device=str(processes.device))
    backbone = _load_backbone(config)
    frozen = FrozenProof.of(backbone)
    datasets = [open_dataset(folder) for folder in config.datasets]
    contract = joint_contract(datasets, config.policy, cameras=config.intents.cameras, execute=config.execute)
    start = _start(backbone, contract, config)
    inputs = _inputs(backbone, datasets, start, config)
    origin = {"start": start.before.provenance} if start.before is not None else {}
    facts = {**provenance, "loop": asdict(config.loop), "inputs": inputs, **origin}
    facts |= warn_of_reserved(datasets) if processes.first else {}
    if processes.first:
        for name in ("checkpoint", "best"):
            require_free(out / name)
        claim(out / "inputs.json", inputs, f"'{out}' holds another run")
        robots = open_robots(backbone, datasets, config, start)  # fills the caches
    processes.wait()
    if not processes.first:
        robots = open_robots(backbone, datasets, config, start)

    def policy(weights: PolicyNetwork) -> CheckpointPolicy:
        start.restore(weights)
        spaces = {**start.spaces(), **contract.action_spaces}
        fitted = {robot.dataset.space.robot: robot.transforms for robot in robots}
        return CheckpointPolicy(
            backbone=backbone,
            frozen=frozen,
            layer=config.intents.layer,
            network=weights,
            transforms={**start.transforms(), **fitted},
            contract=replace(contract, action_spaces={name: spaces[name] for name in start.robots}),
        )

    ema, driven = Ema(start.network, config.policy.ema), drive if processes.first else None
    if config.cache is not None and drive is None:
        del backbone
    _run(start.network, ema, robots, config, out, driven and (lambda step, now: driven(step, policy(now))))
    if config.cache is not None and drive is None:
        backbone = _load_backbone(config)
    frozen.require(backbone, "after Stage II")
    if processes.first:
        policy(cast(PolicyNetwork, ema.module)).save(out / "checkpoint", facts)
        best = Best(out)
        if best.facts:
            best.load(start.network)
            policy(start.network).save(out / "best", {**facts, **best.facts})
    processes.wait()
    return out / "checkpoint"


def _start(backbone: Backbone, contract: PolicyContract, config: PolicyTrainingConfig) -> Start:
    if config.start is None:
        start = fresh(config.policy, backbone.hidden_size, list(contract.action_spaces), config.loop.seed)
    else:
        start = continued(
            CheckpointPolicy.load(config.start),
            backbone=backbone,
            layer=config.intents.layer,
            config=config.policy,
            contract=contract,
            only_new=config.only_new,
        )
    start.network.to(config.device)
    start.freeze()
    return start


def _inputs(
    backbone: Backbone, datasets: Sequence[EpisodeDataset], start: Start, config: PolicyTrainingConfig
) -> dict[str, Any]:
    """Everything that a run depends on, beside the loop's own config."""
    return {
        "robots": list(start.robots),
        "intents": [describe(backbone, data, config.intents) for data in datasets],
        "policy": asdict(config.policy),
        "weights": dict(config.weights),
        "held_out": config.held_out,
        "start": start.before.contract.revision if start.before is not None else "",
        "only_new": config.only_new,
    }


class Best:
    """The weights of the best evaluation of a run, in `out/best.safetensors`."""

    def __init__(self, out: Path) -> None:
        self.file, self.facts = out / "best.safetensors", dict[str, str]()
        if self.file.exists():
            with safe_open(self.file, "pt") as stored:
                self.facts = stored.metadata() or {}

    def keep(self, weights: nn.Module, step: int, found: Mapping[str, float]) -> None:
        """Keep these weights if they are the best so far: by success, or without it by validation loss."""
        score = found.get("success", -found.get("val_loss_flow", math.inf))
        if score > float(self.facts.get("score", -math.inf)):
            self.facts = {"score": str(score), "step": str(step)}
            with replacing(self.file) as temporary:
                save_file(weights.state_dict(), temporary, self.facts)

    def load(self, network: nn.Module) -> None:
        network.load_state_dict(load_file(self.file))


def _run(
    network: PolicyNetwork,
    ema: Ema,
    robots: Sequence[PolicyDataset],
    config: PolicyTrainingConfig,
    out: Path,
    drive: Callable[[int, PolicyNetwork], Mapping[str, float]] | None,
) -> None:
    teacher, names = cast(PolicyNetwork, ema.module), ("loss_flow", "loss_future")
    best, first = Best(out), Processes.join(config.device).first

    def loss(batch: PolicyBatch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        losses = network.loss(batch.to(config.device), teacher)
        return losses["loss"], {name: losses[name].detach() for name in names}

    held = anything_held_out(robots, config.weights)
    if config.held_out and not held and first:
        Console(stderr=True).print("no held-out episode is of what is trained: there is no validation loss")

    def evaluate(step: int) -> Mapping[str, float]:
        found = dict[str, float]()
        if held and config.validation_batches:
            batches = map(sampler_of(robots, config, train=False), range(config.validation_batches))
            rows = [teacher.loss(batch.to(config.device), teacher) for batch in batches]
            found |= {f"val_{name}": sum(float(row[name]) for row in rows) / len(rows) for name in names}
        if drive is not None:
            found |= drive(step, teacher)
        if first:
            best.keep(teacher, step, found)
        return found

    sampler = sampler_of(robots, config)

    def next_batch(step: int, part: Part) -> Piece[PolicyBatch]:
        batch = sampler(step, part)
        return Piece(batch, batch.ids, weight=len(batch.ids))

    run_loop(network, loss, next_batch, config.loop, out, ema=ema, on_eval=evaluate)


def _load_backbone(config: PolicyTrainingConfig) -> Backbone:
    backbone = Backbone.load(config.backbone, device=config.device, dtype=getattr(torch, config.dtype))
    backbone.freeze()
    return backbone
