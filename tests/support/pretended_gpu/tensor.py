"""Tensors of a pretended GPU: the checks and the log of synchronisations of their operators."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import blm

PACKAGE = Path(blm.__file__).parent
ROOT = PACKAGE.parent
META = torch.device("meta")
"""Device of the tensors as C++ sees it."""
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount"}
READS |= {"unique_consecutive", "_unique", "_unique2", "unique_dim", "unique_dim_consecutive"}
"""Operators that make the host wait for a value or a size."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
"""Operators whose index tensors may be on the CPU; they are copied."""
TAKES_CPU_SCALARS = {"fill", "fill_", "masked_fill", "masked_fill_", "where", "lerp", "lerp_"}
"""Operators besides the pointwise ones that accept a CPU tensor without dimensions."""
SUPPORT = str(Path(__file__).parent) + os.sep
"""This folder; its lines are never reported as the cause of a synchronisation."""


class DeviceMismatchError(RuntimeError):
    """An operator got tensors on devices that CUDA cannot combine."""


@dataclass(frozen=True)
class Sync:
    """One wait of the host for the device."""

    kind: str
    where: str
    """File and line of the package; of the caller of torch if the package is not on the stack."""
    via: str
    """File and line of what called torch, as that of a model in transformers."""
    thread: str


class GpuTensor(torch.Tensor):
    """A tensor on a pretended GPU; `elem` holds its values on the CPU."""

    elem: Tensor
    index: int

    @staticmethod
    def __new__(cls, elem: Tensor, index: int = 0, requires_grad: bool = False) -> GpuTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=META,
            requires_grad=requires_grad,
        )
        made.elem, made.index = elem, index
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.index)

    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def get_device(self) -> int:
        return self.index

    def tolist(self) -> Any:
        record_sync("tolist")
        return self.elem.tolist()

    def numpy(self, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} tensor to numpy; use Tensor.cpu() first")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> GpuTensor:
        if id(self) in memo:
            return memo[id(self)]
        assert self.is_leaf
        made = GpuTensor(self.elem.clone(), self.index, self.requires_grad)
        if hasattr(self, "_is_param"):
            made._is_param = True
        memo[id(self)] = made
        return made

    def __repr__(self, **kwargs: Any) -> str:
        return f"GpuTensor({self.elem!r}, device='{self.device}')"


@dataclass
class CurrentCall(threading.local):
    """The devices that the running call of torch names, in each thread."""

    index: int | None = None
    """GPU of the result of a factory or a copy; None: the call names no GPU."""
    last: int = 0
    """GPU of the last operator, for tensors that C++ creates like another tensor."""
    meta: bool = False
    """Whether the call names torch's own "meta" device."""


current_call = CurrentCall()
sync_log: list[Sync] = []


def record_sync(kind: str) -> None:
    sync_log.append(Sync(kind, *call_site(), threading.current_thread().name))


def _is_ignored(file: str) -> bool:
    return file.startswith(SUPPORT) or file == contextlib.__file__ or f"{os.sep}torch{os.sep}" in file


def call_site() -> tuple[str, str]:
    """Return the innermost line of the package on the stack, and the one that called torch."""
    frame, outer = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if not outer and not _is_ignored(name):
            outer = f"{Path(name).name}:{frame.f_lineno}"
        if name.startswith(str(PACKAGE) + os.sep):
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}", outer
        frame = frame.f_back  # type: ignore[assignment]
    return outer, outer


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the CPU values, and record whether the host would wait for the device.

    Raises DeviceMismatchError where CUDA would refuse the operator.
    """
    name = func.overloadpacket.__name__
    tensors = list(_tensors((args, *kwargs.values())))
    ours = [x for x in tensors if isinstance(x, GpuTensor)]
    target = kwargs.get("device")
    target = None if target is None else torch.device(target)
    to_gpu = target is not None and target.type == META.type and not current_call.meta
    if not ours and not to_gpu:
        return func(*args, **kwargs)
    aim = current_call.last if current_call.index is None else current_call.index
    index = current_call.last = ours[0].index if ours else aim
    _require_one_device(func, name, args, tensors)
    _record_waits(func, name, args, kwargs, ours)
    _refuse_generator(kwargs, name)
    inner: dict[str, Any] = {**kwargs, "device": torch.device("cpu")} if to_gpu else kwargs
    out = func(*_map(unwrap, args), **{key: _map(unwrap, x) for key, x in inner.items()})
    known = {id(x.elem): x for x in ours}
    wrap = to_gpu or target is None

    def outer(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in known:
            same = known[id(x)]
            assert same.shape == x.shape, f"{name} changes the shape of a tensor in place"
            return same
        return GpuTensor(x, index) if wrap else x

    if name == "copy_":  # of a CPU tensor from ours: the CPU tensor stays one
        return args[0]
    return _map(outer, out)


def _tensors(x: Any) -> Iterator[Tensor]:
    """Yield the tensors among the arguments of an operator."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for part in x:
            yield from _tensors(part)


def _map(change: Callable[[Any], Any], x: Any) -> Any:
    """Apply a function to nested lists and tuples; several times faster than torch's `tree_map`."""
    if isinstance(x, list | tuple):
        return type(x)([_map(change, part) for part in x])
    return change(x)


def unwrap(x: Any) -> Any:
    return x.elem if isinstance(x, GpuTensor) else x


def _require_one_device(func: Any, name: str, args: Any, tensors: list[Any]) -> None:
    ours = [x for x in tensors if isinstance(x, GpuTensor)]
    if len({x.index for x in ours}) > 1:
        raise DeviceMismatchError(
            f"{name}: tensors on {sorted({str(x.device) for x in ours})} at {call_site()[0]}"
        )
    theirs = [x for x in tensors if not isinstance(x, GpuTensor)]
    if not ours or not theirs or name in ("copy_", "_to_copy", "_foreach_copy_"):
        return
    if name in INDEXING and isinstance(args[0], GpuTensor):
        places = [x for x in args[1] if x is not None and not isinstance(x, GpuTensor)]
        theirs = [x for x in theirs if not any(x is place for place in places) and x.ndim]
    elif name.startswith("_foreach_") or torch.Tag.pointwise in func.tags or name in TAKES_CPU_SCALARS:
        written = func._schema.is_mutable and not isinstance(args[0], GpuTensor | list | tuple)
        theirs = theirs if written else [x for x in theirs if x.ndim]
    if theirs:
        shapes = [tuple(x.shape) for x in theirs]
        raise DeviceMismatchError(
            f"{name}: {ours[0].device} meets CPU tensors of shape {shapes} at {call_site()[0]}"
        )


def _record_waits(func: Any, name: str, args: Any, kwargs: dict[str, Any], ours: list[GpuTensor]) -> None:
    if (name in READS and ours) or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        record_sync(name)
    elif name in INDEXING:
        places = [x for x in args[1] if x is not None]
        filled = "put" in name and len(places) == 1 and args[2].numel() == 1
        if any(x.dtype in (torch.bool, torch.uint8) for x in places) and not filled:
            record_sync("boolean mask")
        if any(not isinstance(x, GpuTensor) for x in places):
            record_sync("index from the CPU")
    elif name == "copy_" and isinstance(args[0], GpuTensor) != isinstance(args[1], GpuTensor):
        blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        _record_copy(args[1], blocking, into=args[0])
    elif name == "_to_copy" and kwargs.get("device") is not None:
        to_gpu = torch.device(kwargs["device"]).type == META.type
        if to_gpu != isinstance(args[0], GpuTensor):
            _record_copy(args[0], not kwargs.get("non_blocking"))


def _record_copy(source: Tensor, blocking: bool, into: Tensor | None = None) -> None:
    to_gpu = not isinstance(source, GpuTensor)
    host = source if to_gpu else into
    if blocking or host is None or not getattr(host, "pinned", False):
        record_sync("copy to the device" if to_gpu else "copy to the host")


def _refuse_generator(kwargs: dict[str, Any], name: str) -> None:
    if kwargs.get("generator") is not None:
        raise DeviceMismatchError(f"{name}: a CPU generator for a tensor on a GPU at {call_site()[0]}")
