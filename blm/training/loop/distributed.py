"""Training in several processes: who this one is, DDP or FSDP2 around a module, sums over all of them.

`accelerate launch` (or torchrun) starts the processes; without a launcher there is one and nothing changes.
FSDP2 is torch's `fully_shard`: parameters are DTensors split over the processes. accelerate's own set-up of
it knows accelerators only; this one also runs on CPUs (gloo), where the tests are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """One of `count` parts of the work of a step: what one process reads at once."""

    index: int = 0
    count: int = 1

    def of(self, items: Sequence[T]) -> Sequence[T]:
        return items[self.index :: self.count]


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int
    count: int
    device: torch.device
    """Of this process."""

    @classmethod
    def join(cls, device: torch.device | str = "cpu") -> Processes:
        """Meet the other processes, if a launcher started any.

        A process alone keeps `device` as it is, also "cuda:3"; several have one GPU each, by local rank.
        """
        device = torch.device(device)
        state = PartialState(cpu=device.type == "cpu")
        given = state.num_processes == 1 or device.type == "cpu"
        return cls(state.process_index, state.num_processes, device if given else state.device)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def parts(self, accumulate: int) -> list[Part]:
        """Return the parts that this process works on in a step, one after the other."""
        return [Part(turn * self.count + self.rank, accumulate * self.count) for turn in range(accumulate)]

    def sum(self, values: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
        """Return sums over all processes, which must give the same names: float64, on this device.

        The host does not wait for them; `read` does.
        """
        names = sorted(values)
        total = torch.stack([self._number(values[name]) for name in names])
        if self.count > 1:
            dist.all_reduce(total)
        return dict(zip(names, total.unbind(), strict=True))

    def _number(self, value: Tensor | float) -> Tensor:
        """Return a float64 without dimensions on this device; `full` writes a number without a copy."""
        if isinstance(value, Tensor):
            return value.detach().to(torch.float64)
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def gather(self, value: Tensor) -> list[Tensor]:
        """Return a tensor of one shape from every process, in order of rank, on the CPU."""
        if self.count == 1:
            return [value]
        room = [torch.empty_like(value, device=self.device) for _ in range(self.count)]
        dist.all_gather(room, value.to(self.device))
        return [part.cpu() for part in room]

    def gather_objects(self, value: T) -> list[T]:
        if self.count == 1:
            return [value]
        room: list[Any] = [None] * self.count
        dist.all_gather_object(room, value)
        return room

    def leave(self) -> None:
        """End the meeting of the processes; the program is about to end."""
        PartialState().destroy_process_group()

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()


def read(*groups: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """Copy numbers of one precision and device to the host; it waits for the device once for all of them."""
    numbers = iter(torch.stack([value for group in groups for value in group.values()]).tolist())
    return [dict(zip(group, numbers, strict=False)) for group in groups]


class Step(nn.Module):
    """`loss_fn` as the forward of a module, so that what wraps modules can wrap any function of a batch."""

    def __init__(self, module: nn.Module, loss_fn: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.loss_fn = module, loss_fn

    def forward(self, batch: Any) -> Any:
        return self.loss_fn(batch)


def wants_shards() -> bool:
    """Return whether `accelerate launch --use_fsdp` started this process."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def spread(
    module: nn.Module, loss_fn: Callable[..., Any], processes: Processes, shard: bool
) -> tuple[nn.Module, Callable[[], None]]:
    """Return a module whose forward is `loss_fn` and whose backward averages gradients over the processes.

    With `shard` the parameters of `module` become DTensors, one unit per block (the classes that transformers
    models name in `_no_split_modules`), and every process must use the same parameters in a step (see
    `MaskedLossModel`); else each process keeps all parameters. The function returned makes `module` plain
    again.
    """
    step = Step(module, loss_fn)
    if processes.count == 1:
        return step, lambda: None
    if not shard:
        # a process whose rows have no picture uses no parameter of the eye, hence `find_unused_parameters`
        return DistributedDataParallel(
            step, find_unused_parameters=True, broadcast_buffers=False
        ), lambda: None
    plain = [(part, type(part), _hooks(part)) for part in module.modules()]
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    blocks = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    for part in [part for part in module.modules() if type(part).__name__ in blocks]:
        fully_shard(part, mesh=mesh)
    fully_shard(step, mesh=mesh)

    def undo() -> None:
        _make_parameters_whole(module)
        for part, kind, hooks in plain:
            part.__class__ = kind
            part.__dict__.update(hooks)

    return step, undo


def _hooks(module: nn.Module) -> dict[str, Any]:
    """Copies of the hooks of a module: `fully_shard` adds some and offers no way back."""
    return {name: copy.copy(value) for name, value in vars(module).items() if "_hooks" in name}


def _make_parameters_whole(module: nn.Module) -> None:
    """Replace DTensors by whole parameters in every process; tied ones stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, value in list(module.named_parameters(remove_duplicate=False)):
        if value not in made:
            made[value] = nn.Parameter(full(value.detach()), requires_grad=value.requires_grad)
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner).register_parameter(leaf, made[value])


def unsynced(step: nn.Module) -> AbstractContextManager[None]:
    """Return the context of all but the last part of a step: DDP then keeps gradients to itself."""
    return step.no_sync() if isinstance(step, DistributedDataParallel) else nullcontext()


@contextmanager
def whole(step: nn.Module) -> Iterator[None]:
    """Have all weights in every process for a while, so that a model can be used as if there were one."""
    units = [part for part in step.modules() if isinstance(part, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    yield
    for unit in units:
        unit.reshard()
        unit.set_reshard_after_forward(unit is not step, recurse=False)


def full(value: Tensor) -> Tensor:
    """Return a whole tensor; every process must call this for a DTensor."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def fill(value: Tensor, whole_value: Tensor) -> None:
    """Copy a whole tensor, the same in every process, into a tensor or into this process's part of it."""
    if isinstance(value, DTensor):
        from torch.distributed.tensor import distribute_tensor

        here = whole_value.to(value.device)
        local = distribute_tensor(here, value.device_mesh, value.placements, src_data_rank=None)
        value.to_local().copy_(local.to_local())
    else:
        value.copy_(whole_value)
