"""The training loop: forward, backward, clip, optimizer step, EMA, log, checkpoint, exact resume.

Its parts are in separate files: the learning-rate schedule (`lr_schedule.py`), optimizers, EMA,
data prefetching (`batches.py`), DDP and FSDP2 (`distributed.py`), metrics, checkpoints
(`state.py`).

A run is a pure function of the initial weights, the batches and the config; a killed run continues
from its last checkpoint to the same weights, bit for bit on a CPU. The batch of a step is split
into micro-batches (processes times `accumulate`). Gradients are averaged over all of them, so their
number changes only the rounding. `out/log.jsonl` gets rows of step, loss and metrics (means since
the last row), grad_norm, lr, samples_per_s, tokens_per_s, padding_share, data_share (share of time
spent waiting for batches), seconds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from blm.backbone.precision import WeightDtype, frozen_dtype
from blm.io import lock_folder
from blm.training.loop.batches import Microbatch, open_batches
from blm.training.loop.distributed import (
    DataShard,
    Processes,
    fsdp_requested,
    full_tensor,
    gathered_weights,
    read_scalars,
    without_gradient_sync,
    wrap_for_processes,
)
from blm.training.loop.ema import Ema
from blm.training.loop.lr_schedule import cosine_with_warmup
from blm.training.loop.metrics import Meter, MetricsLog
from blm.training.loop.optimizers import Optimizers
from blm.training.loop.state import CheckpointWriter, restore_state, truncate_log
from blm.types import BlmError, require_numbers

MAY_CHANGE = ("log_every", "save_every", "eval_every", "title", "keep", "shard", "accumulate", "trackers")
"""Fields of LoopConfig that do not change what a run computes; a resumed run may change them."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    steps: int = 0
    """Number of optimizer steps; give this, or --loop.epochs in Stage I."""
    epochs: float = 0.0
    """Length of Stage I in passes over all examples, such as 1.5, instead of --loop.steps."""
    batch_size: int
    """Number of samples per step, summed over all processes and micro-batches."""
    lr: float = 1e-3
    """Peak learning rate of AdamW, reached after the warm-up."""
    muon: float = 0.0
    """Peak learning rate of Muon, such as 0.02, for the weight matrices inside blocks.
    The default, 0, optimises all parameters with AdamW."""
    weight_decay: float = 0.01
    """Weight decay of parameters with two or more dimensions; other parameters have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates beta_1 and beta_2 of AdamW's moment estimates, each in 0..1."""
    warmup_fraction: float = 0.03
    """Fraction of all steps in which the learning rate rises linearly to its peak, 0..1."""
    clip: float = 1.0
    """Maximum norm of the gradient; larger gradients are scaled down to it."""
    accumulate: int = 1
    """Gradient accumulation: the number of micro-batches that each process runs per step.
    A larger number saves memory and costs time; the result is the same up to rounding."""
    shard: bool = False
    """Shard the weights and optimizer states over the processes (FSDP2).
    By default, every process holds a copy (DDP).
    The option --use_fsdp of `accelerate launch` also shards."""
    log_every: int = 10
    """Number of steps between rows of the log."""
    save_every: int = 500
    """Number of steps between checkpoints."""
    keep: int = 1
    """Number of recent checkpoints to keep; older ones are removed."""
    eval_every: int = 0
    """Number of steps between evaluations; 0 evaluates at the end only."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that also receive the log, through accelerate; their packages must be installed."""
    precision: WeightDtype | None = None
    """Precision of the products in the loss; by default bfloat16 on CUDA and float32 elsewhere.
    Trained weights, moments and sums of gradients stay in float32."""
    seed: int = 0
    """Seed for the order of the samples and for dropout."""
    title: str = "training"
    """Label of the progress bar."""

    def __post_init__(self) -> None:
        require_numbers(self, steps=(0, 10**12), epochs=(0, 1e6))
        if bool(self.steps) == bool(self.epochs):
            raise BlmError(
                f"loop.steps is {self.steps} and loop.epochs is {self.epochs:g}; give one of both, above 0"
            )
        counts = ("batch_size", "accumulate", "log_every", "save_every", "keep")
        for name in (*counts, "lr", "clip"):
            if not getattr(self, name) > 0:
                raise BlmError(f"{name} is {getattr(self, name)}; it must be positive")
        require_numbers(self, **dict.fromkeys(counts, (1, 10**12)))
        require_numbers(self, lr=(0, 1e3), clip=(0, 1e9), muon=(0, 1e3), weight_decay=(0, 1e3))
        require_numbers(
            self, betas=(0, 1), warmup_fraction=(0, 1), eval_every=(0, 10**12), seed=(0, 2**32 - 1)
        )

    def counted(self, examples: int) -> LoopConfig:
        """Return the config in steps, of which `self.epochs` passes over this many examples take
        ceil(epochs * examples / batch_size)."""
        if not self.epochs:
            return self
        return replace(self, steps=math.ceil(self.epochs * examples / self.batch_size), epochs=0.0)


B = TypeVar("B")


def require_precision(device: torch.device, precision: WeightDtype | None) -> torch.dtype:
    """Return the precision of the products in the loss on a device. Raises BlmError for one that it
    lacks; commands call this before they prepare data."""
    return frozen_dtype(device, precision, flag="--loop.precision")


def run_loop(
    module: nn.Module,
    loss_fn: Callable[[B], tuple[Tensor, Mapping[str, Tensor | float]]],
    next_batch: Callable[[int, DataShard], Microbatch[B]],
    config: LoopConfig,
    out: Path,
    *,
    learning_rate: Callable[[str], float] | None = None,
    ema: Ema | None = None,
    on_eval: Callable[[int], Mapping[str, float]] | None = None,
) -> None:
    """Train the parameters of `module` that require gradients; resume the run in `out`, if any.

    `next_batch(step, shard)`, step = 0, 1, .., returns one micro-batch; those of all shards form
    the batch of the step. It must depend only on its arguments (and the seed): it runs one step
    ahead in a separate thread, or further ahead in the worker processes of `ByWorkers`, so it may
    not use torch's global generator. `loss_fn(batch)` returns the mean loss of a micro-batch and
    metrics to log (also means); it runs under autocast to `config.precision`.
    `learning_rate(name)` replaces `config.lr` for a parameter. `on_eval(steps done)` returns
    numbers to add to a log row; every process calls it, with unsharded weights.

    Raises BlmError when a loss or gradient is not finite, before the weights change; when `out`
    holds a run of another config or module; when another process trains there; and for a precision
    that the device lacks.
    """
    if not config.steps:
        raise BlmError(f"this training has no epochs of {config.epochs:g}; give --loop.steps")
    device = next(module.parameters()).device
    dtype = require_precision(device, config.precision)
    out.mkdir(parents=True, exist_ok=True)
    processes = Processes.join(device)
    if config.batch_size < processes.count * config.accumulate:
        parts = f"{processes.count} processes x {config.accumulate} parts"
        raise BlmError(f"batch_size is {config.batch_size}, but a step has {parts}; each needs a sample")
    shard = config.shard or fsdp_requested()
    wrapped, unwrap = wrap_for_processes(
        module, loss_fn, processes, shard=shard, accumulate=config.accumulate, dtype=dtype
    )
    devices = [device] if device.type == "cuda" else []
    with lock_folder(out) if processes.first else nullcontext(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(config.seed * 65_537 + processes.rank)
        optimizer = Optimizers(
            module,
            learning_rate or (lambda name: config.lr),
            lr=config.lr,
            muon=config.muon,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        _Run[B](wrapped, module, config, out, processes, optimizer, ema, dtype).train(next_batch, on_eval)
    unwrap()


@dataclass
class _Run(Generic[B]):
    """One call of `run_loop`."""

    loss_module: nn.Module
    """Its forward computes the loss; wrapped in DDP or FSDP2 for several processes."""
    module: nn.Module
    config: LoopConfig
    out: Path
    processes: Processes
    optimizer: Optimizers
    ema: Ema | None
    dtype: torch.dtype
    """Precision of the loss's products."""

    def train(
        self,
        next_batch: Callable[[int, DataShard], Microbatch[B]],
        on_eval: Callable[[int], Mapping[str, float]] | None,
    ) -> None:
        config, first = self.config, self.processes.first
        start, seconds = restore_state(self.out, asdict(config), self.tensors(), self.processes, MAY_CHANGE)
        if first:
            truncate_log(self.out / "log.jsonl", start)
        meter, steps = Meter(seconds), range(start, config.steps)
        shards, pin = self.processes.data_shards(config.accumulate), self.processes.device.type == "cuda"
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with (
            Progress(*columns, console=Console(stderr=True), disable=not first) as bar,
            MetricsLog(self.out, config.trackers, asdict(config), on=first) as log,
            CheckpointWriter(self.out, self.processes, config.keep) as writer,
            open_batches(next_batch, steps, shards, pin=pin) as batches,
        ):
            task = bar.add_task(config.title, total=config.steps, completed=start)
            for step, (microbatches, wait) in enumerate(batches, start):
                values, sizes = self.update(step, microbatches)
                meter.add(values, sizes, wait)
                done = step + 1
                last = done == config.steps
                evaluate = on_eval is not None and (last or _is_due(done, config.eval_every))
                if last or evaluate or _is_due(done, config.log_every):
                    row = {"step": done, **meter.row(config.lr * self.lr_factor(step))}
                    if on_eval is not None and evaluate:
                        with gathered_weights(self.loss_module):
                            found = dict(on_eval(done))
                        row |= found
                        if first:
                            text = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
                            bar.console.print(f"step {done}: {text}", highlight=False, soft_wrap=True)
                    log.write(row)
                    meter = Meter(meter.seconds)
                if last or _is_due(done, config.save_every):
                    header = {"done": done, "seconds": meter.seconds, "config": asdict(config)}
                    writer.save(header, self.tensors())
                writer.raise_error()
                bar.update(task, advance=1, description=f"{config.title}  loss {values['loss']:.4f}")

    def update(
        self, step: int, microbatches: Sequence[Microbatch[B]]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Take one optimizer step; return the means to log and the sizes.

        The means are those of loss, metrics and the gradient norm before clipping. The host waits
        for the device once, to read them all.
        """
        self.optimizer.zero_grad()
        kind = self.processes.device.type
        sizes = self.processes.sum(
            {
                "weight": sum(microbatch.weight for microbatch in microbatches),
                "samples": sum(len(microbatch.ids) for microbatch in microbatches),
                "tokens": sum(microbatch.tokens for microbatch in microbatches),
                "positions": sum(microbatch.positions for microbatch in microbatches),
            }
        )
        sums = defaultdict[str, Tensor | float](float)
        for microbatch in microbatches:
            share = microbatch.weight / sizes["weight"].clamp_min(1.0e-9)
            last = microbatch is microbatches[-1]
            with nullcontext() if last else without_gradient_sync(self.loss_module):
                with torch.autocast(kind, self.dtype, enabled=self.dtype is not torch.float32):
                    loss, metrics = self.loss_module(microbatch.batch)
                # DDP and FSDP average over processes
                _weighted(loss, share * self.processes.count).backward()
            for name, metric in {"loss": loss.detach(), **metrics}.items():
                sums[name] = sums[name] + _weighted(metric, share)
        means = self.processes.sum(sums) | {"grad_norm": self.clip()}
        values, counts = read_scalars(means, sizes)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            mine = [name for microbatch in microbatches for name in microbatch.ids]
            ids = [name for names in self.processes.gather_objects(mine) for name in names]
            raise BlmError(
                f"loss {values['loss']}, gradient norm {values['grad_norm']} at step {step}, samples {ids}: "
                "not finite. Lower the learning rate or inspect these samples; the last checkpoint is intact"
            )
        self.optimizer.step(self.lr_factor(step))
        if self.ema is not None:
            self.ema.update(self.module, step)
        return values, counts

    def lr_factor(self, step: int) -> float:
        """Return the factor of the peak learning rates at a step, 0 .. 1."""
        return cosine_with_warmup(step, steps=self.config.steps, warmup_fraction=self.config.warmup_fraction)

    def clip(self) -> Tensor:
        """Clip the gradient of all parameters; return its norm before clipping, as float64.

        Parameters that no sample used get a gradient of zero, because AdamW treats zero and None
        differently.
        """
        parameters = list(self.optimizer.names.values())
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        # by default, torch treats DTensors one by one
        foreach = True if isinstance(parameters[0], DTensor) else None
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip, foreach=foreach)
        return full_tensor(norm).to(torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint, without frozen parameters."""
        tensors = {f"buffer/{name}": value for name, value in self.module.named_buffers()}
        tensors |= {f"weight/{name}": p.detach() for name, p in self.optimizer.names.items()}
        tensors |= {f"moment/{name}": value for name, value in self.optimizer.state().items()}
        if self.ema is not None:
            state = self.ema.module.state_dict(keep_vars=True)
            tensors |= {f"ema/{name}": value for name, value in state.items()}
        return tensors


def _weighted(value: Any, share: Tensor) -> Any:
    """Return value * share, rounded as if the float64 tensor `share` were a Python number."""
    if not isinstance(value, Tensor):
        return value * share
    return value * share.to(value.dtype if value.is_floating_point() else torch.get_default_dtype())


def _is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
