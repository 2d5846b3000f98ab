"""Stage II, policy training: bridge and policy on demonstrations, with a frozen backbone.

One policy is trained for several robots, each with one row in the indexed weights. With a
hidden-state cache the backbone is in memory only before the first step and after the last. The run
ends with a proof that the backbone has not changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blm.backbone.backbone import Backbone
from blm.backbone.precision import WeightDtype, frozen_dtype, require_attention
from blm.datasets.lerobot import EpisodeDataset, open_dataset
from blm.io import replacing
from blm.policy.checkpoint import require_free
from blm.policy.network import PolicyBatch, PolicyConfig, PolicyNetwork
from blm.policy.policy import CheckpointPolicy, FrozenProof
from blm.training.loop.batches import ByWorkers, MakeBatch, Microbatch, prefetch
from blm.training.loop.distributed import DataShard, Processes
from blm.training.loop.ema import Ema
from blm.training.loop.loop import LoopConfig, run_loop
from blm.training.policy.add_robot import InitialPolicy, from_checkpoint, from_scratch
from blm.training.policy.hidden_state_cache import ALONE, cache_hidden_states, describe
from blm.training.policy.hidden_states import HiddenStateConfig, LiveHiddenStates
from blm.training.policy.live import Live, LiveBatch, LiveBatches, open_live
from blm.training.policy.sampler import (
    WHOLE_BATCH,
    HiddenStateSource,
    PolicyDataset,
    PolicySampler,
    anything_held_out,
    joint_contract,
    require_weights,
    split,
    warn_of_reserved,
)
from blm.training.run_inputs import require_same_facts, require_same_inputs, run_together
from blm.types import BlmError, PolicyContract, require_numbers


@dataclass(frozen=True, kw_only=True)
class PolicyTrainingConfig:
    """Stage II: datasets, backbone, policy and training loop."""

    datasets: tuple[Path, ...]
    """Dataset folders, at least one per robot: demonstrations and corrections."""
    backbone: str
    """Folder that Stage I wrote, or the name of a backbone."""
    intents: HiddenStateConfig
    """Hidden states H_k, which the bridge turns into intent tokens."""
    loop: LoopConfig
    """Training loop."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Bridge, diffusion transformer and losses."""
    cache: Path | None = None
    """Folder of the hidden-state caches, one per dataset; several runs can share it.
    Without a cache, H_k is computed for every batch."""
    start: Path | None = None
    """Checkpoint whose weights initialise the training; its robots may be a subset.
    By default, the weights are random."""
    only_new: bool = False
    """Train only the per-robot weights of robots that the checkpoint --start does not have."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Sampling weights of frames, as pairs of a robot's or task's name and a number.
    The default weight is 1; frames of weight 0 are never sampled."""
    execute: int = 8
    """Number of actions of a chunk to execute before the next observation.
    It is stored in the contract of the checkpoint."""
    held_out: float = 0.05
    """Fraction of each dataset's episodes that is held out for the validation loss, 0..0.9."""
    validation_batches: int = 8
    """Number of held-out batches per validation."""
    device: str = "cpu"
    """Torch device: cpu, cuda, cuda:N or mps."""
    dtype: WeightDtype | None = None
    """Precision of the frozen backbone; by default bfloat16 on CUDA and float32 elsewhere."""
    attn_implementation: str | None = None
    """Attention implementation of the backbone in transformers: eager, sdpa, flash_attention_2, ..;
    by default the model's own."""

    def __post_init__(self) -> None:
        require_numbers(self, held_out=(0, 0.9), validation_batches=(0, 1_000_000))
        require_weights(self.weights)
        require_attention(self.attn_implementation)
        if self.only_new and self.start is None:
            raise BlmError("only_new needs a checkpoint to start from")
        if not 1 <= self.execute <= self.policy.horizon:
            raise BlmError(f"execute {self.execute} must lie in 1..horizon = {self.policy.horizon}")
        stride, steps = self.intents.stride, self.policy.future_steps
        if steps % stride:
            raise BlmError(f"stride {stride} of the hidden states must divide future_steps = {steps}")


def open_datasets(
    backbone: Backbone,
    datasets: Sequence[EpisodeDataset],
    config: PolicyTrainingConfig,
    start: InitialPolicy,
    processes: Processes = ALONE,
) -> list[PolicyDataset]:
    """Split the episodes, fit the transforms, and open the hidden states; all of `processes` fill
    the caches, where needed."""
    opened = split(
        datasets,
        config.policy,
        stride=config.intents.stride,
        held_out=config.held_out,
        seed=config.loop.seed,
        robots=start.robots,
        transforms=start.transforms(),
    )
    return [
        replace(one, hidden_states=_hidden_states(backbone, one.dataset, config, name, processes))
        for one, name in zip(opened, cache_names(datasets), strict=True)
    ]


def _hidden_states(
    backbone: Backbone,
    dataset: EpisodeDataset,
    config: PolicyTrainingConfig,
    name: str,
    processes: Processes,
) -> HiddenStateSource:
    if config.cache is None:
        return LiveHiddenStates(backbone, dataset, config.intents)
    folder = config.cache / name
    return cache_hidden_states(backbone, config.backbone, dataset, config.intents, folder, processes)


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


ClosedLoopValidation = Callable[[int, CheckpointPolicy], Mapping[str, float]]
"""(steps done, policy) -> metrics of closed-loop episodes: "success" (0..1), and others to log."""


def train_stage2(
    config: PolicyTrainingConfig,
    out: Path,
    provenance: Mapping[str, Any],
    *,
    validate: ClosedLoopValidation | None = None,
) -> Path:
    """Train a policy, log to `out/log.jsonl`, write and return the folder `out/checkpoint`.

    A killed run resumes. `out/best` is the checkpoint with the highest success in `validate` (which
    keeps the backbone in memory), or without it, with the lowest validation loss. `provenance` (the
    command, for instance) is stored in both, with that of the checkpoint to start from as "start".
    Raises BlmError if datasets and config do not match, and if the backbone has changed.
    """
    processes = Processes.join(config.device)
    config = replace(config, device=str(processes.device))
    backbone = _load_backbone(config)
    frozen = FrozenProof.of(backbone)
    datasets = [open_dataset(folder) for folder in config.datasets]
    contract = joint_contract(datasets, config.policy, cameras=config.intents.cameras, execute=config.execute)
    start = _start(backbone, contract, config)
    inputs = _inputs(backbone, datasets, start, config)
    origin = {"start": start.checkpoint.provenance} if start.checkpoint is not None else {}
    facts = {**provenance, "loop": asdict(config.loop), "inputs": inputs, **origin}
    facts |= warn_of_reserved(datasets) if processes.first else {}
    _prepare_folder(out, inputs, processes)
    opened = open_datasets(backbone, datasets, config, start, processes)

    def policy(weights: PolicyNetwork) -> CheckpointPolicy:
        start.restore_old_rows(weights)
        spaces = {**start.spaces(), **contract.action_spaces}
        fitted = {one.dataset.space.robot: one.transforms for one in opened}
        return CheckpointPolicy(
            backbone=backbone,
            frozen=frozen,
            layer=config.intents.layer,
            network=weights,
            transforms={**start.transforms(), **fitted},
            contract=replace(contract, action_spaces={name: spaces[name] for name in start.robots}),
        )

    def validate_weights(step: int, weights: PolicyNetwork) -> Mapping[str, float]:
        return validate(step, policy(weights)) if validate is not None and processes.first else {}

    ema = Ema(start.network, config.policy.ema)
    if config.cache is not None and validate is None:
        del backbone
    _run(start.network, ema, opened, config, out, validate_weights)
    if config.cache is not None and validate is None:
        backbone = _load_backbone(config)
    frozen.require(backbone, "after Stage II")
    frozen.compare_logits(backbone, "after Stage II")
    if processes.first:
        policy(cast(PolicyNetwork, ema.module)).save(out / "checkpoint", facts)
        best = BestCheckpoint(out)
        if best.facts:
            best.load(start.network)
            policy(start.network).save(out / "best", {**facts, **best.facts})
    processes.wait()
    return out / "checkpoint"


def _prepare_folder(out: Path, inputs: Mapping[str, Any], processes: Processes) -> None:
    """Record the inputs of the run. Raises BlmError, in every process, if it may not write to
    `out`, or if the processes have different inputs."""

    def prepare() -> None:
        if processes.first:
            for name in ("checkpoint", "best"):
                require_free(out / name)
            require_same_inputs(out / "inputs.json", inputs, f"'{out}' holds another run")

    require_same_facts(processes, f"'{out}'", inputs)
    run_together(processes, prepare)


def _start(backbone: Backbone, contract: PolicyContract, config: PolicyTrainingConfig) -> InitialPolicy:
    if config.start is None:
        start = from_scratch(
            config.policy, backbone.hidden_size, list(contract.action_spaces), config.loop.seed
        )
    else:
        start = from_checkpoint(
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
    backbone: Backbone, datasets: Sequence[EpisodeDataset], start: InitialPolicy, config: PolicyTrainingConfig
) -> dict[str, Any]:
    """Return all inputs that a run depends on, except the loop's config, for inputs.json."""
    return {
        "robots": list(start.robots),
        "intents": [describe(backbone, data, config.intents) for data in datasets],
        "policy": asdict(config.policy),
        "weights": dict(config.weights),
        "held_out": config.held_out,
        "start": start.checkpoint.contract.revision if start.checkpoint is not None else "",
        "only_new": config.only_new,
    }


class BestCheckpoint:
    """Tracks the weights with the best validation of a run, in `out/best.safetensors`."""

    def __init__(self, out: Path) -> None:
        self.file, self.facts = out / "best.safetensors", dict[str, str]()
        if self.file.exists():
            with safe_open(self.file, "pt") as stored:
                self.facts = stored.metadata() or {}

    def update(self, weights: nn.Module, step: int, metrics: Mapping[str, float]) -> None:
        """Save these weights if they are the best so far, by success or validation loss."""
        score = metrics.get("success", -metrics.get("val_loss_flow", math.inf))
        if score > float(self.facts.get("score", -math.inf)):
            self.facts = {"score": str(score), "step": str(step)}
            with replacing(self.file) as temporary:
                save_file(weights.state_dict(), temporary, self.facts)

    def load(self, network: nn.Module) -> None:
        """Copy the best weights into `network`."""
        network.load_state_dict(load_file(self.file))


def _run(
    network: PolicyNetwork,
    ema: Ema,
    datasets: Sequence[PolicyDataset],
    config: PolicyTrainingConfig,
    out: Path,
    validate: Callable[[int, PolicyNetwork], Mapping[str, float]],
) -> None:
    """Run the training loop; the EMA is the teacher of the future loss and is validated."""
    teacher = cast(PolicyNetwork, ema.module)
    names = ("loss_flow", "loss_future")
    best = BestCheckpoint(out)
    first = Processes.join(config.device).first
    source, live = datasets[0].hidden_states, None
    if isinstance(source, LiveHiddenStates):
        live = open_live(source.backbone, config.backbone, datasets, config.intents)

    def ready(batch: PolicyBatch | LiveBatch) -> PolicyBatch:
        if isinstance(batch, LiveBatch):
            assert live is not None
            return live.tap(batch)
        return batch.to(config.device)

    def loss(batch: PolicyBatch | LiveBatch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        losses = network.loss(ready(batch), teacher)
        return losses["loss"], {name: losses[name].detach() for name in names}

    held_out = anything_held_out(datasets, config.weights)
    if config.held_out and not held_out and first:
        Console(stderr=True).print(
            "no held-out episode belongs to a trained robot and task, so there is no validation loss"
        )

    def evaluate(step: int) -> Mapping[str, float]:
        metrics = dict[str, float]()
        if held_out and config.validation_batches:
            steps = range(config.validation_batches)
            batches = prefetch(_make_batch(datasets, config, live, train=False), steps, [WHOLE_BATCH])
            losses = [teacher.loss(ready(one.batch), teacher) for (one,), _ in batches]
            for name in names:
                metrics[f"val_{name}"] = sum(float(loss[name]) for loss in losses) / len(losses)
        metrics |= validate(step, teacher)
        if first:
            best.update(teacher, step, metrics)
        return metrics

    next_batch = _make_batch(datasets, config, live)
    run_loop(network, loss, next_batch, config.loop, out, ema=ema, on_eval=evaluate)


def _make_batch(
    datasets: Sequence[PolicyDataset], config: PolicyTrainingConfig, live: Live | None, *, train: bool = True
) -> MakeBatch[Any]:
    """Return the function that makes a micro-batch: with cached hidden states, or with prompts."""
    if live is not None:
        plain = [replace(one, hidden_states=None) for one in datasets]  # workers get no weights
        make = LiveBatches(make_sampler(plain, config, train=train), live.reader, config.intents)
        return ByWorkers(make, config.intents.workers)
    sampler = make_sampler(datasets, config, train=train)

    def next_batch(step: int, shard: DataShard) -> Microbatch[PolicyBatch]:
        batch = sampler(step, shard)
        return Microbatch(batch, batch.ids, weight=len(batch.ids))

    return next_batch


def _load_backbone(config: PolicyTrainingConfig) -> Backbone:
    backbone = Backbone.load(
        config.backbone,
        device=config.device,
        dtype=frozen_dtype(config.device, config.dtype),
        attn_implementation=config.attn_implementation,
    )
    backbone.freeze()
    return backbone
