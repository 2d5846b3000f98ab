"""The training loop: forward, backward, clip, optimizer step, EMA, log, checkpoint, exact resume.

Its parts are files of their own: the learning-rate schedule (`lr_schedule.py`), optimizers, EMA,
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from blm.io import lock_folder
from blm.training.loop.batches import Microbatch, prefetch
from blm.training.loop.distributed import (
    DataShard,
    Processes,
    fsdp_requested,
    full_tensor,
    gathered_weights,
    without_gradient_sync,
    wrap_for_processes,
)
from blm.training.loop.ema import Ema
from blm.training.loop.lr_schedule import cosine_with_warmup
from blm.training.loop.metrics import Meter, MetricsLog
from blm.training.loop.optimizers import Optimizers
from blm.training.loop.state import restore_state, save_state, truncate_log
from blm.types import BlmError, require_numbers

MAY_CHANGE = ("log_every", "save_every", "eval_every", "title", "keep", "shard", "accumulate", "trackers")
"""Fields of LoopConfig that do not change what a run computes; a resumed run may change them."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    steps: int
    batch_size: int
    """Samples of a step, over all processes and micro-batches."""
    lr: float = 1e-3
    """Peak learning rate; see lr_schedule.py."""
    muon: float = 0.0
    """Peak learning rate of Muon for matrices inside blocks (see optimizers.py), about 0.02; 0:
    AdamW for all parameters."""
    weight_decay: float = 0.01
    """For parameters with two or more dimensions only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's beta_1 and beta_2."""
    warmup_fraction: float = 0.03
    """Share of all steps in which the learning rate rises."""
    clip: float = 1.0
    """Maximum norm of the gradient of all parameters together."""
    accumulate: int = 1
    """Gradient accumulation: micro-batches that a process handles one after the other in a step.
    Saves memory, costs time, gives the same result."""
    shard: bool = False
    """Shard weights and optimizer moments over the processes (FSDP2) instead of copying them (DDP),
    as does the flag --use_fsdp of `accelerate launch`."""
    log_every: int = 10
    """Steps between rows of the log."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep: int = 1
    """Number of checkpoints to keep; older ones are removed."""
    eval_every: int = 0
    """Steps between evaluations; 0: evaluate at the end only."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also send the log to these trackers, through accelerate; their packages must be installed."""
    seed: int = 0
    """For the order of samples, and for dropout."""
    title: str = "training"
    """Label of the progress bar."""

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulate", "log_every", "save_every", "keep")
        for name in (*counts, "lr", "clip"):
            if not getattr(self, name) > 0:
                raise BlmError(f"{name} is {getattr(self, name)}; it must be positive")
        require_numbers(self, **dict.fromkeys(counts, (1, 10**12)))
        require_numbers(self, lr=(0, 1e3), clip=(0, 1e9), muon=(0, 1e3), weight_decay=(0, 1e3))
        require_numbers(
            self, betas=(0, 1), warmup_fraction=(0, 1), eval_every=(0, 10**12), seed=(0, 2**32 - 1)
        )


B = TypeVar("B")


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
    """Train the parameters of `module` that require gradients; resume the run in `out`, if there is
    one.

    `next_batch(step, shard)`, step = 0, 1, .., returns one micro-batch; those of all shards form
    the batch of the step. It must depend on its arguments (and the seed) alone: it runs one step
    ahead in its own thread, so it may not use torch's global generator. `loss_fn(batch)` returns
    the mean loss of a micro-batch and metrics to log (means, too); on CUDA it runs under bfloat16
    autocast. `learning_rate(name)` replaces `config.lr` for a parameter. `on_eval(steps done)`
    returns numbers to add to a log row; every process calls it, with unsharded weights.

    Raises BlmError when a loss or gradient is not finite, before the weights change; when `out`
    holds a run of another config or module; and when another process trains there.
    """
    out.mkdir(parents=True, exist_ok=True)
    kind = next(module.parameters()).device.type
    processes = Processes.join(kind)
    if config.batch_size < processes.count * config.accumulate:
        parts = f"{processes.count} processes x {config.accumulate} parts"
        raise BlmError(f"batch_size is {config.batch_size}, but a step has {parts}; each needs a sample")
    wrapped, unwrap = wrap_for_processes(module, loss_fn, processes, config.shard or fsdp_requested())
    devices = [torch.cuda.current_device()] if kind == "cuda" else []
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
        _Run[B](wrapped, module, config, out, processes, optimizer, ema).train(next_batch, on_eval)
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

    def train(
        self,
        next_batch: Callable[[int, DataShard], Microbatch[B]],
        on_eval: Callable[[int], Mapping[str, float]] | None,
    ) -> None:
        config, first = self.config, self.processes.first
        start, seconds = restore_state(self.out, asdict(config), self.tensors(), self.processes, MAY_CHANGE)
        if first:
            truncate_log(self.out / "log.jsonl", start)
        meter = Meter(seconds)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with (
            Progress(*columns, console=Console(stderr=True), disable=not first) as bar,
            MetricsLog(self.out, config.trackers, asdict(config), on=first) as log,
        ):
            task = bar.add_task(config.title, total=config.steps, completed=start)
            shards = self.processes.data_shards(config.accumulate)
            batches = prefetch(next_batch, range(start, config.steps), shards)
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
                    save_state(self.out, header, self.tensors(), self.processes, config.keep)
                bar.update(task, advance=1, description=f"{config.title}  loss {values['loss']:.4f}")

    def update(
        self, step: int, microbatches: Sequence[Microbatch[B]]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Make one optimizer step; return (loss, metrics and gradient norm before clipping) and
        sizes."""
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
        sums = defaultdict[str, Any](float)
        for microbatch in microbatches:
            share = microbatch.weight / max(sizes["weight"], 1.0e-9)
            last = microbatch is microbatches[-1]
            with nullcontext() if last else without_gradient_sync(self.loss_module):
                with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
                    loss, metrics = self.loss_module(microbatch.batch)
                (loss * (share * self.processes.count)).backward()  # DDP and FSDP average over processes
            for name, metric in {"loss": loss.detach(), **metrics}.items():
                sums[name] = sums[name] + metric * share
        values = self.processes.sum(sums)
        values["grad_norm"] = self.clip()
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            mine = [name for microbatch in microbatches for name in microbatch.ids]
            ids = [name for names in self.processes.gather_objects(mine) for name in names]
            raise BlmError(
                f"loss {values['loss']}, gradient norm {values['grad_norm']} at step {step}, samples {ids}: "
                "not finite. Lower the learning rate or look at these samples; the last checkpoint is intact"
            )
        self.optimizer.step(self.lr_factor(step))
        if self.ema is not None:
            self.ema.update(self.module, step)
        return values, sizes

    def lr_factor(self, step: int) -> float:
        """Return the share of its peak that every learning rate has at a step."""
        return cosine_with_warmup(step, steps=self.config.steps, warmup_fraction=self.config.warmup_fraction)

    def clip(self) -> float:
        """Clip the gradient of all parameters; return its norm before clipping.

        Parameters that no sample used get a gradient of zero: to AdamW, zero and none are not the
        same.
        """
        parameters = list(self.optimizer.names.values())
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return full_tensor(nn.utils.clip_grad_norm_(parameters, self.config.clip)).item()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint; frozen parameters are not among them."""
        tensors = {f"buffer/{name}": value for name, value in self.module.named_buffers()}
        tensors |= {f"weight/{name}": p.detach() for name, p in self.optimizer.names.items()}
        tensors |= {f"moment/{name}": value for name, value in self.optimizer.state().items()}
        if self.ema is not None:
            state = self.ema.module.state_dict(keep_vars=True)
            tensors |= {f"ema/{name}": value for name, value in state.items()}
        return tensors


def _is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
