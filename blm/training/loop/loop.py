"""The one training loop: cosine schedule, log, checkpoints and exact resume, in one process or many.

A run is a pure function of the initial weights, the batches and the config; a killed run continues from its
last checkpoint to the same weights, bit for bit on a CPU. The work of a step is cut into parts (processes
times `accumulate`); the loss is the mean over all of them, so how many there are changes only the rounding.
`out/log.jsonl` gets rows of step, loss and metrics (means since the last row), grad_norm, lr, samples_per_s,
tokens_per_s, padding_share, data_share (time spent waiting for batches) and seconds.
"""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data._utils.pin_memory import pin_memory

from blm.io import hold
from blm.training.loop.distributed import Part, Processes, full, read, spread, unsynced, wants_shards, whole
from blm.training.loop.metrics import Log, Meter
from blm.training.loop.optimizers import Optimizers
from blm.training.loop.state import cut_log, restore, save
from blm.types import BlmError, require_numbers

_MAY_CHANGE = ("log_every", "save_every", "eval_every", "title", "keep", "shard", "accumulate", "trackers")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    steps: int
    batch_size: int
    """Samples of a step, over all processes and parts."""
    lr: float = 1e-3
    """Peak learning rate: linear warm-up, then half a cosine to zero."""
    muon: float = 0.0
    """Peak rate of Muon for matrices inside blocks (see optimizers.py); 0: AdamW for all. About 0.02."""
    weight_decay: float = 0.01
    """Of parameters with two or more dimensions."""
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_fraction: float = 0.03
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    accumulate: int = 1
    """Parts that a process works on one after the other in a step: memory for time, with the same result."""
    shard: bool = False
    """Split weights and moments over the processes (FSDP2) instead of copying them (DDP); the flag --use_fsdp
    of `accelerate launch` does the same."""
    log_every: int = 10
    save_every: int = 500
    keep: int = 1
    """Checkpoints that stay: the last ones."""
    eval_every: int = 0
    """Steps between calls of `on_eval`; 0: at the end only."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also send the log there, through accelerate; the package must be installed."""
    seed: int = 0
    """For `next_batch`, and for what the model draws (dropout)."""
    title: str = "training"

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


@dataclass(frozen=True)
class Piece(Generic[B]):
    """What a process reads at once."""

    batch: B
    ids: Sequence[object]
    """Names of its samples, for error messages and samples_per_s."""
    weight: float = 1.0
    """How many things (answer tokens, for instance) its loss is the mean of."""
    tokens: int = 0
    """Real tokens, for tokens_per_s."""
    positions: int = 0
    """Tokens and padding, for padding_share."""


class Ema:
    """A copy of a module whose weights w follow the trained ones v: w <- d w + (1 - d) v.

    It is whole in every process, also when the trained weights are split.
    d = min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, module: nn.Module, decay: float = 0.995) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        for average, trained in zip(self.module.parameters(), module.parameters(), strict=True):
            average.lerp_(full(trained.detach()), weight)
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)


def run_loop(
    module: nn.Module,
    loss_fn: Callable[[B], tuple[Tensor, Mapping[str, Tensor | float]]],
    next_batch: Callable[[int, Part], Piece[B]],
    config: LoopConfig,
    out: Path,
    *,
    learning_rate: Callable[[str], float] | None = None,
    ema: Ema | None = None,
    on_eval: Callable[[int], Mapping[str, float]] | None = None,
) -> None:
    """Train the parameters of `module` that require gradients; continue the run in `out`, if there is one.

    `next_batch(step, part)`, step = 0, 1, .., must depend on its arguments (and the seed) alone: it runs one
    step ahead in its own thread, so it may not use torch's global generator; the parts of a step together
    are its batch. `loss_fn(batch)` gives the mean loss of a piece and metrics to log, means too, under
    bfloat16 autocast on CUDA. `learning_rate(name)` replaces `config.lr` for a parameter. `on_eval(steps
    done)` adds its numbers to a log row; every process calls it, with all weights at hand. Raises BlmError at
    a loss or gradient that is not finite, before the weights are touched, and when `out` holds a run of
    another config or module, or when another process trains there.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = next(module.parameters()).device
    processes = Processes.join(device)
    if config.batch_size < processes.count * config.accumulate:
        parts = f"{processes.count} processes x {config.accumulate} parts"
        raise BlmError(f"batch_size is {config.batch_size}, but a step has {parts}; each needs a sample")
    wrapped, undo = spread(module, loss_fn, processes, config.shard or wants_shards())
    devices = [device] if device.type == "cuda" else []
    with hold(out) if processes.first else nullcontext(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(config.seed * 65_537 + processes.rank)
        optimizer = Optimizers(
            module,
            learning_rate or (lambda name: config.lr),
            lr=config.lr,
            muon=config.muon,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        make = _pinned(next_batch) if device.type == "cuda" else next_batch
        _Run[B](wrapped, module, config, out, processes, optimizer, ema).train(make, on_eval)
    undo()


@dataclass
class _Run(Generic[B]):
    step: nn.Module
    """Its forward is the loss; wrapped for several processes."""
    module: nn.Module
    config: LoopConfig
    out: Path
    processes: Processes
    optimizer: Optimizers
    ema: Ema | None

    def train(
        self,
        next_batch: Callable[[int, Part], Piece[B]],
        on_eval: Callable[[int], Mapping[str, float]] | None,
    ) -> None:
        config, first = self.config, self.processes.first
        start, before = restore(self.out, asdict(config), self.tensors(), self.processes, _MAY_CHANGE)
        if first:
            cut_log(self.out / "log.jsonl", start)
        meter, done = Meter(before), start
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with (
            Progress(*columns, console=Console(stderr=True), disable=not first) as bar,
            Log(self.out, config.trackers, asdict(config), on=first) as log,
        ):
            task = bar.add_task(config.title, total=config.steps, completed=start)
            ahead = _ahead(next_batch, range(start, config.steps), self.processes.parts(config.accumulate))
            for step, (pieces, wait) in enumerate(ahead, start):
                values, sizes = self.update(step, pieces)
                meter.add(values, sizes, wait)
                done, last = step + 1, step + 1 == config.steps
                evaluate = on_eval is not None and (last or _due(done, config.eval_every))
                if last or evaluate or _due(done, config.log_every):
                    row = {"step": done, **meter.row(config.lr * _schedule(config, step))}
                    if on_eval is not None and evaluate:
                        with whole(self.step):
                            found = dict(on_eval(done))
                        row |= found
                        if first:
                            text = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
                            bar.console.print(f"step {done}: {text}", highlight=False, soft_wrap=True)
                    log.write(row)
                    meter = Meter(meter.seconds)
                if last or _due(done, config.save_every):
                    header = {"done": done, "seconds": meter.seconds, "config": asdict(config)}
                    save(self.out, header, self.tensors(), self.processes, config.keep)
                bar.update(task, advance=1, description=f"{config.title}  loss {values['loss']:.4f}")

    def update(self, step: int, pieces: Sequence[Piece[B]]) -> tuple[dict[str, float], dict[str, float]]:
        """Make one optimizer step; return loss, metrics and gradient norm before clipping, and sizes.

        The host waits for the device once, to read all these numbers.
        """
        self.optimizer.zero_grad()
        kind = self.processes.device.type
        sizes = self.processes.sum(
            {
                "weight": sum(piece.weight for piece in pieces),
                "samples": sum(len(piece.ids) for piece in pieces),
                "tokens": sum(piece.tokens for piece in pieces),
                "positions": sum(piece.positions for piece in pieces),
            }
        )
        sums = defaultdict[str, Any](float)
        for piece in pieces:
            share = piece.weight / sizes["weight"].clamp_min(1.0e-9)
            with unsynced(self.step) if piece is not pieces[-1] else nullcontext():
                with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
                    loss, metrics = self.step(piece.batch)
                # the processes' gradients are averaged
                _weighted(loss, share * self.processes.count).backward()
            for name, metric in {"loss": loss.detach(), **metrics}.items():
                sums[name] = sums[name] + _weighted(metric, share)
        totals = self.processes.sum(sums) | {"grad_norm": self.clip()}
        values, counts = read(totals, sizes)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            mine = [name for piece in pieces for name in piece.ids]
            ids = [name for part in self.processes.gather_objects(mine) for name in part]
            raise BlmError(
                f"loss {values['loss']}, gradient norm {values['grad_norm']} at step {step}, samples {ids}: "
                "not finite. Lower the learning rate or look at these samples; the last checkpoint is intact"
            )
        self.optimizer.step(_schedule(self.config, step))
        if self.ema is not None:
            self.ema.update(self.module, step)
        return values, counts

    def clip(self) -> Tensor:
        """Clip the whole gradient; return its norm before. What no row needed gets a gradient of zero."""
        parameters = list(self.optimizer.names.values())
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return full(nn.utils.clip_grad_norm_(parameters, self.config.clip)).to(torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds; frozen parameters belong to whoever froze them."""
        tensors = {f"buffer/{name}": value for name, value in self.module.named_buffers()}
        tensors |= {f"weight/{name}": p.detach() for name, p in self.optimizer.names.items()}
        tensors |= {f"moment/{name}": value for name, value in self.optimizer.state().items()}
        if self.ema is not None:
            state = self.ema.module.state_dict(keep_vars=True)
            tensors |= {f"ema/{name}": value for name, value in state.items()}
        return tensors


def _weighted(value: Any, share: Tensor) -> Any:
    """Return a tensor times a float64 in the tensor's precision, as if `share` were a Python number."""
    if not isinstance(value, Tensor):
        return value * share
    return value * share.to(value.dtype if value.is_floating_point() else torch.get_default_dtype())


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _ahead(
    next_batch: Callable[[int, Part], Piece[B]], steps: range, parts: Sequence[Part]
) -> Iterator[tuple[list[Piece[B]], float]]:
    """Yield the pieces of a step and the seconds waited for them, making those of one step ahead."""

    def make(step: int) -> list[Piece[B]]:
        return [next_batch(step, part) for part in parts]

    with ThreadPoolExecutor(1, "batches") as pool:
        ahead = [pool.submit(make, step) for step in steps[:1]]
        for step in steps:
            begin = time.perf_counter()
            pieces = ahead.pop().result()
            ahead = [pool.submit(make, step + 1)] if step + 1 in steps else []
            yield pieces, time.perf_counter() - begin


def _pinned(next_batch: Callable[[int, Part], Piece[B]]) -> Callable[[int, Part], Piece[B]]:
    """Have batches in page-locked memory, from which they are copied while the device computes.

    As of DataLoader: tensors in containers, and what an object's own `pin_memory` returns.
    """

    def make(step: int, part: Part) -> Piece[B]:
        piece = next_batch(step, part)
        return replace(piece, batch=pin_memory(piece.batch))

    return make


def _schedule(config: LoopConfig, step: int) -> float:
    """Return the share of its peak that every rate has at a step."""
    warmup = max(1, round(config.warmup_fraction * config.steps))
    fall = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / max(1, config.steps - warmup))
    return min(1.0, (step + 1) / warmup) * fall
