"""Distributed training: ranks, DDP or FSDP2 around a module, reductions over all processes.

`accelerate launch` (or torchrun) starts the processes; without a launcher there is one process.
FSDP2 is torch's `fully_shard`: parameters become DTensors that are sharded over the processes.
accelerate sets it up for accelerators only; this module also runs on CPUs (gloo), where the tests
run.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from blm.types import BlmError

TIMEOUT_VARIABLE = "BLM_PROCESS_TIMEOUT"
"""Environment variable: how long processes wait for each other [s]."""
T = TypeVar("T")


@dataclass(frozen=True)
class DataShard:
    """One of `count` interleaved shards of a batch or of a list of items."""

    index: int = 0
    count: int = 1

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """Return every `count`-th item, beginning with `index`."""
        return items[self.index :: self.count]


@dataclass(frozen=True)
class Processes:
    """The processes that train together, seen from this one."""

    rank: int
    count: int
    device: torch.device
    """Device of this process."""

    @classmethod
    def join(cls, device: str | torch.device = "cpu") -> Processes:
        """Join the process group, if a launcher started one.

        `device` is a torch device. One process uses it as it is; of several, each uses its own GPU,
        so "cuda" is given. The first call reads the environment variable BLM_PROCESS_TIMEOUT.
        Raises BlmError for a GPU that is not the one of this process.
        """
        wanted = torch.device(device)
        state = PartialState(cpu=wanted.type == "cpu", **_process_group_options())
        if state.num_processes == 1 or wanted.type == "cpu":
            return cls(state.process_index, state.num_processes, wanted)
        if wanted.index is not None and wanted != state.device:
            raise BlmError(
                f"device '{wanted}' was given, but process {state.process_index} of {state.num_processes} "
                f"uses '{state.device}': give --device {wanted.type}"
            )
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def data_shards(self, accumulate: int) -> list[DataShard]:
        """Return the shards of a step's batch that this process handles, one micro-batch each."""
        count = accumulate * self.count
        return [DataShard(turn * self.count + self.rank, count) for turn in range(accumulate)]

    def sum(self, values: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
        """Return sums over all processes, all of which must pass the same names.

        The sums are float64 scalars on this device, so that the host does not wait for them;
        `read_scalars` copies them to the host.
        """
        names = sorted(values)
        total = torch.stack([self._scalar(values[name]) for name in names])
        if self.count > 1:
            dist.all_reduce(total)
        return dict(zip(names, total.unbind(), strict=True))

    def _scalar(self, value: Tensor | float) -> Tensor:
        """Return a float64 scalar on this device; `full` writes a Python number without a copy."""
        if isinstance(value, Tensor):
            return value.detach().to(torch.float64)
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def gather(self, value: Tensor) -> list[Tensor]:
        """Return the tensors (all of one shape) of every process, in order of rank, on the CPU."""
        if self.count == 1:
            return [value]
        gathered = [torch.empty_like(value, device=self.device) for _ in range(self.count)]
        dist.all_gather(gathered, value.to(self.device))
        return [tensor.cpu() for tensor in gathered]

    def gather_objects(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Return the objects of every process, in order of rank; they are pickled on the way.

        `group` is another group of all processes, for a thread of its own.
        """
        if self.count == 1:
            return [value]
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, value, group)
        return gathered

    def leave(self) -> None:
        """Destroy the process group, before the program ends, when all processes have arrived here:
        one that still uses the group must not lose it."""
        self.wait()
        PartialState().destroy_process_group()

    def wait(self) -> None:
        """Wait until all processes arrive here."""
        if self.count > 1:
            dist.barrier()


def process_timeout() -> float | None:
    """Return how long processes wait for each other [s], from the environment variable
    BLM_PROCESS_TIMEOUT; None: torch's default, 600 s for NCCL and 1,800 s for gloo.

    Raises BlmError for a value that is not a positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise BlmError(f"{TIMEOUT_VARIABLE} is '{text}'; give a positive number of seconds")
    return seconds


def _process_group_options() -> dict[str, Any]:
    seconds = process_timeout()
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return {"timeout": timedelta(seconds=seconds)} if seconds is not None and launched else {}


def read_scalars(*groups: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """Copy scalars of one dtype and device to the host, waiting for the device only once."""
    values = iter(torch.stack([value for group in groups for value in group.values()]).tolist())
    return [{name: next(values) for name in group} for group in groups]


class LossModule(nn.Module):
    """A module whose forward is `loss_fn`: DDP and FSDP2 wrap modules, not functions."""

    def __init__(self, module: nn.Module, loss_fn: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.loss_fn = module, loss_fn

    def forward(self, batch: Any) -> Any:
        return self.loss_fn(batch)


def fsdp_requested() -> bool:
    """Return whether `accelerate launch --use_fsdp` started this process."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def wrap_for_processes(
    module: nn.Module,
    loss_fn: Callable[..., Any],
    processes: Processes,
    *,
    shard: bool,
    accumulate: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, Callable[[], None]]:
    """Return a module that computes `loss_fn` and averages gradients over the processes.

    Every process must use the same parameters in every step, whatever its samples are (see
    `MaskedLossModel`). With `shard` the parameters of `module` become DTensors (FSDP2), one unit
    per block (the classes that transformers models name in `_no_split_modules`): each process keeps
    its part of the weights as they are, blocks are gathered and computed in `dtype`, and gradients
    are added up in float32. Otherwise each process keeps all parameters (DDP). The second result is
    a function that undoes the wrapping.
    """
    loss_module = LossModule(module, loss_fn)
    if processes.count == 1:
        return loss_module, lambda: None
    if not shard:
        return _data_parallel(loss_module, accumulate), lambda: None
    plain = [(part, type(part), _hooks(part)) for part in module.modules()]
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    mixed = MixedPrecisionPolicy()
    if dtype is not torch.float32:
        mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    blocks = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    for part in [part for part in module.modules() if type(part).__name__ in blocks]:
        fully_shard(part, mesh=mesh, mp_policy=mixed)
    # the batch keeps its precision: it also holds the targets of the loss
    fully_shard(loss_module, mesh=mesh, mp_policy=replace(mixed, cast_forward_inputs=False))

    def unwrap() -> None:
        _unshard_parameters(module)
        for part, kind, hooks in plain:
            part.__class__ = kind
            part.__dict__.update(hooks)

    return loss_module, unwrap


def _data_parallel(loss_module: LossModule, accumulate: int) -> nn.Module:
    """Return the module in DDP, whose first pass records which parameters the loss uses: some are
    used by no batch, such as the last block of a vision tower whose features are read before it.

    DDP cannot record them in a pass without synchronisation (torch 2.13: "expect_autograd_hooks_
    INTERNAL ASSERT"), as the first of several micro-batches is. It then searches the graph of the
    last micro-batch of every step.
    """
    several = accumulate > 1
    return DistributedDataParallel(
        loss_module,
        static_graph=not several,
        find_unused_parameters=several,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
    )


def _hooks(module: nn.Module) -> dict[str, Any]:
    """Return copies of a module's hooks: `fully_shard` adds hooks and cannot remove them."""
    return {name: copy.copy(value) for name, value in vars(module).items() if "_hooks" in name}


def _unshard_parameters(module: nn.Module) -> None:
    """Replace DTensors by full parameters in every process; tied parameters stay tied."""
    full: dict[nn.Parameter, nn.Parameter] = {}
    for name, value in list(module.named_parameters(remove_duplicate=False)):
        if value not in full:
            full[value] = nn.Parameter(full_tensor(value.detach()), requires_grad=value.requires_grad)
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner).register_parameter(leaf, full[value])


def without_gradient_sync(loss_module: nn.Module) -> AbstractContextManager[None]:
    """Return the context for all but the last micro-batch of a step.

    Within it, DDP averages no gradients.
    """
    if isinstance(loss_module, DistributedDataParallel):
        return loss_module.no_sync()
    return nullcontext()


@contextmanager
def gathered_weights(loss_module: nn.Module) -> Iterator[None]:
    """Unshard all weights inside the context, so that each process can evaluate the model alone."""
    units = [part for part in loss_module.modules() if isinstance(part, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    yield
    for unit in units:
        unit.reshard()
        unit.set_reshard_after_forward(unit is not loss_module, recurse=False)


def full_tensor(value: Tensor) -> Tensor:
    """Return the unsharded tensor; every process must call this for a DTensor."""
    return value.full_tensor() if isinstance(value, DTensor) else value
