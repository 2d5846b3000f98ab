"""The one training loop: AdamW, cosine schedule, log, checkpoints and exact resume.

A run is a pure function of the initial weights, the batches and the config; a killed run continues from
`out/state.safetensors` to the same weights, bit for bit on a CPU. `out/log.jsonl` gets rows of step, loss and
metrics (means since the last row), grad_norm, lr, samples_per_s, data_share (time spent waiting for batches)
and seconds.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from blm.types import BlmError

_MAY_CHANGE = ("log_every", "save_every", "eval_every", "title")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    steps: int
    batch_size: int
    lr: float = 1e-3
    """Peak learning rate: linear warm-up, then half a cosine to zero."""
    weight_decay: float = 0.01
    """Of parameters with two or more dimensions."""
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_fraction: float = 0.03
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    log_every: int = 10
    save_every: int = 500
    eval_every: int = 0
    """Steps between calls of `on_eval`; 0: at the end only."""
    seed: int = 0
    """For `next_batch`."""
    title: str = "training"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr", "clip", "log_every", "save_every"):
            if getattr(self, name) <= 0:
                raise BlmError(f"{name} is {getattr(self, name)}; it must be positive")


class Batch(Protocol):
    """What `next_batch` returns; `ids` name its samples in error messages."""

    @property
    def ids(self) -> Sequence[object]: ...


B = TypeVar("B", bound=Batch)


class Ema:
    """A copy of a module whose weights w follow the trained ones v: w <- d w + (1 - d) v.

    d = min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, module: nn.Module, decay: float = 0.995) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        for average, trained in zip(self.module.parameters(), module.parameters(), strict=True):
            average.lerp_(trained, weight)
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)


def run_loop(
    module: nn.Module,
    loss_fn: Callable[[B], tuple[Tensor, Mapping[str, Tensor | float]]],
    next_batch: Callable[[int], B],
    config: LoopConfig,
    out: Path,
    *,
    learning_rate: Callable[[str], float] | None = None,
    ema: Ema | None = None,
    on_eval: Callable[[int], Mapping[str, float]] | None = None,
) -> None:
    """Train the parameters of `module` that require gradients; continue the run in `out`, if there is one.

    `next_batch(step)`, step = 0, 1, .., must depend on the step (and the seed) alone: it runs one step ahead
    in its own thread, so it may not use torch's global generator. `loss_fn(batch)` gives the scalar loss and
    metrics to log, under bfloat16 autocast on CUDA. `learning_rate(name)` replaces `config.lr` for a
    parameter. `on_eval(steps done)` adds its numbers to a log row. Raises BlmError at a loss or gradient that
    is not finite, before the weights are touched, and when `out` holds a run of another config or module.
    """
    out.mkdir(parents=True, exist_ok=True)
    optimizer = _optimizer(module, config, learning_rate)
    start, seconds = _restore(out, config, _tensors(module, optimizer, ema))
    device = next(module.parameters()).device.type
    values, waited, mark = defaultdict[str, list[float]](list), 0.0, time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (out / "log.jsonl").open("a") as log, Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(config.title, total=config.steps, completed=start)
        for step, batch, wait in _batches(next_batch, range(start, config.steps)):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss, metrics = loss_fn(batch)
            value, norm = _update(optimizer, loss, config, step, batch.ids)
            if ema is not None:
                ema.update(module, step)
            for name, metric in {"loss": value, **metrics, "grad_norm": norm}.items():
                values[name].append(metric.item() if isinstance(metric, Tensor) else metric)
            waited, done, last = waited + wait, step + 1, step + 1 == config.steps
            evaluate = on_eval is not None and (last or _due(done, config.eval_every))
            if last or evaluate or _due(done, config.log_every):
                elapsed = time.perf_counter() - mark
                seconds += elapsed
                row = {"step": done, **{name: sum(group) / len(group) for name, group in values.items()}}
                row["lr"] = max(group["lr"] for group in optimizer.param_groups)
                row["samples_per_s"] = len(values["loss"]) * config.batch_size / elapsed
                row |= {"data_share": waited / elapsed, "seconds": seconds}
                if on_eval is not None and evaluate:
                    row |= on_eval(done)
                print(json.dumps(row), file=log, flush=True)
                values, waited, mark = defaultdict(list), 0.0, time.perf_counter()
            if last or _due(done, config.save_every):
                _save(out, config, _tensors(module, optimizer, ema), done, seconds)
            bar.update(task, advance=1, description=f"{config.title}  loss {value:.4f}")


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _batches(next_batch: Callable[[int], B], steps: range) -> Iterator[tuple[int, B, float]]:
    """Yield step, batch and seconds waited for it, making one batch ahead."""
    with ThreadPoolExecutor(1, "batches") as pool:
        ahead = [pool.submit(next_batch, step) for step in steps[:1]]
        for step in steps:
            begin = time.perf_counter()
            batch = ahead.pop().result()
            ahead = [pool.submit(next_batch, step + 1)] if step + 1 in steps else []
            yield step, batch, time.perf_counter() - begin


def _optimizer(
    module: nn.Module, config: LoopConfig, learning_rate: Callable[[str], float] | None
) -> torch.optim.Optimizer:
    """AdamW, one group per (rate, decay); moments exist from the start, so a checkpoint can be copied in."""
    groups = defaultdict[tuple[float, float], list[nn.Parameter]](list)
    for name, p in module.named_parameters():
        if p.requires_grad:
            rate = learning_rate(name) if learning_rate else config.lr
            groups[rate, config.weight_decay if p.ndim >= 2 else 0.0].append(p)
    if not groups:
        raise BlmError("nothing to train: every parameter of the module is frozen")
    options = [{"params": ps, "peak": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]
    optimizer = torch.optim.AdamW(options, lr=config.lr, betas=config.betas, fused=True)
    for p in (p for ps in groups.values() for p in ps):
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def _update(
    optimizer: torch.optim.Optimizer, loss: Tensor, config: LoopConfig, step: int, ids: Sequence[object]
) -> tuple[float, float]:
    """One optimizer step at its scheduled rate; returns the loss and the gradient norm before clipping."""
    warmup = max(1, round(config.warmup_fraction * config.steps))
    fall = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / max(1, config.steps - warmup))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * min(1.0, (step + 1) / warmup) * fall
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], config.clip)
    value, size = loss.item(), norm.item()
    if not (math.isfinite(value) and math.isfinite(size)):
        raise BlmError(
            f"loss {value}, gradient norm {size} at step {step}, samples {list(ids)}: not finite. "
            "Lower the learning rate or look at these samples; the last checkpoint is intact"
        )
    optimizer.step()
    return value, size


def _tensors(module: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None) -> dict[str, Tensor]:
    """Everything that a checkpoint holds; frozen parameters belong to whoever froze them and are left out."""
    tensors = {f"buffer/{name}": value for name, value in module.named_buffers()}
    for name, p in module.named_parameters():
        if p.requires_grad:
            tensors |= {f"weight/{name}": p.detach()}
            tensors |= {f"adam/{name}/{key}": value for key, value in optimizer.state[p].items()}
    if ema is not None:
        tensors |= {f"ema/{name}": value for name, value in ema.module.state_dict(keep_vars=True).items()}
    return tensors


def _save(out: Path, config: LoopConfig, tensors: dict[str, Tensor], done: int, seconds: float) -> None:
    header = json.dumps({"done": done, "seconds": seconds, "config": asdict(config)})
    copies = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    copies["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        copies["rng/cuda"] = torch.cuda.get_rng_state()
    temporary = out / "state.safetensors.tmp"
    save_file(copies, temporary, metadata={"run": header})
    temporary.replace(out / "state.safetensors")


def _restore(out: Path, config: LoopConfig, tensors: dict[str, Tensor]) -> tuple[int, float]:
    """Copy the checkpoint of `out`, if any, into `tensors` and cut the log to it; (steps done, seconds)."""
    done, seconds = 0, 0.0
    if (out / "state.safetensors").exists():
        with safe_open(out / "state.safetensors", "pt") as saved:
            header = json.loads(saved.metadata()["run"])
            done, seconds = header["done"], header["seconds"]
            there = {**header["config"], **{key: getattr(config, key) for key in _MAY_CHANGE}}
            mine = json.loads(json.dumps(asdict(config)))
            if there != mine:
                raise BlmError(f"{out} holds a run of another config; use a new folder.\n  {there}\n  {mine}")
            names = {name for name in saved.keys() if not name.startswith("rng/")}  # noqa: SIM118
            if names != tensors.keys():
                strange = sorted(names ^ tensors.keys())[:5]
                raise BlmError(f"{out} holds a run of another module: {strange} are in one of them only")
            with torch.no_grad():
                for name, value in tensors.items():
                    value.copy_(saved.get_tensor(name))
            torch.set_rng_state(saved.get_tensor("rng/cpu"))
            if torch.cuda.is_available() and "rng/cuda" in saved.keys():  # noqa: SIM118
                torch.cuda.set_rng_state(saved.get_tensor("rng/cuda"))
    log = out / "log.jsonl"
    rows = log.read_text().splitlines() if log.exists() else []
    whole = [row for row in rows if row.endswith("}") and json.loads(row)["step"] <= done]
    log.with_suffix(".tmp").write_text("".join(row + "\n" for row in whole))
    log.with_suffix(".tmp").replace(log)
    return done, seconds
