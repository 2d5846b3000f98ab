"""The training loop of Stage II: batches, losses and validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from blm.policy.network import PolicyBatch
from blm.training.loop.batches import ByWorkers, MakeBatch, Microbatch, prefetch
from blm.training.loop.distributed import DataShard, Processes
from blm.training.loop.ema import Ema
from blm.training.loop.loop import run_loop
from blm.training.policy.backbone_tuning import TrainedModule, TunedBatch, TunedPolicy
from blm.training.policy.best_checkpoint import BestCheckpoint
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hidden_states import LiveHiddenStates
from blm.training.policy.live import Live, LiveBatch, LiveBatches, open_live
from blm.training.policy.open_data import make_sampler
from blm.training.policy.sampler import WHOLE_BATCH, PolicyDataset, anything_held_out

Batch = PolicyBatch | LiveBatch | TunedBatch
"""With cached hidden states, with prompts for a frozen backbone, or for a tuned one."""


def run_policy_loop(
    trained: TrainedModule,
    ema: Ema,
    datasets: Sequence[PolicyDataset],
    config: PolicyTrainingConfig,
    out: Path,
    validate: Callable[[int, TrainedModule], Mapping[str, float]],
) -> None:
    """Run the training loop; the EMA is the teacher of the future loss and is validated.

    `validate(steps done, averaged weights)` returns metrics of closed-loop episodes.
    """
    teacher: Any = ema.module
    best = BestCheckpoint(out)
    source = datasets[0].hidden_states
    live = None
    if isinstance(source, LiveHiddenStates):
        live = open_live(source.backbone, config.backbone, datasets, config.intents)
    first = Processes.join(config.device).first

    def loss(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        module: Any = trained
        losses = dict[str, Tensor](module.loss(_on_device(batch, config.device, live), teacher))
        return losses.pop("loss"), {name: value.detach() for name, value in losses.items()}

    held_out = anything_held_out(datasets, config.weights)
    if config.held_out and not held_out and first:
        Console(stderr=True).print(
            "no held-out episode belongs to a trained robot and task, so there is no validation loss"
        )

    def evaluate(step: int) -> Mapping[str, float]:
        metrics = dict[str, float]()
        if held_out and config.validation_batches:
            make = _make_batch(trained, datasets, config, live, train=False)
            batches = prefetch(make, range(config.validation_batches), [WHOLE_BATCH])
            with torch.no_grad():
                losses = [
                    teacher.loss(_on_device(one.batch, config.device, live), teacher) for (one,), _ in batches
                ]
            for name in ("loss_flow", "loss_future"):
                metrics[f"val_{name}"] = sum(float(loss[name]) for loss in losses) / len(losses)
        metrics |= validate(step, teacher)
        if first:
            best.update(teacher, step, metrics)
        return metrics

    trained.train()  # a checkpoint to start from is in evaluation mode
    next_batch = _make_batch(trained, datasets, config, live, train=True)
    run_loop(trained, loss, next_batch, config.loop, out, ema=ema, on_eval=evaluate)


def _on_device(batch: Batch, device: str, live: Live | None) -> PolicyBatch | TunedBatch:
    if isinstance(batch, LiveBatch):
        assert live is not None
        return live.tap(batch)
    return batch.to(device)


def _make_batch(
    trained: TrainedModule,
    datasets: Sequence[PolicyDataset],
    config: PolicyTrainingConfig,
    live: Live | None,
    *,
    train: bool,
) -> MakeBatch[Any]:
    """Return the function that makes a micro-batch; validation has no conversations."""
    if live is not None:
        plain = [replace(one, hidden_states=None) for one in datasets]  # workers get no weights
        make = LiveBatches(make_sampler(plain, config, train=train), live.reader, config.intents)
        return ByWorkers(make, config.intents.workers)
    frames = make_sampler(datasets, config, train=train)
    sampler: Callable[[int, DataShard], PolicyBatch | TunedBatch] = frames
    if isinstance(trained, TunedPolicy):
        sampler = trained.tuned.sampler(frames, language=train)

    def next_batch(step: int, shard: DataShard) -> Microbatch[PolicyBatch | TunedBatch]:
        batch = sampler(step, shard)
        return Microbatch(batch, batch.ids, weight=len(batch.ids))

    return next_batch
