"""A pretended GPU: tensors that claim a CUDA device, compute on the CPU and behave as CUDA tensors do.

    with PretendedGpu() as gpu:
        gpu.move(module)
        module(batch.to("cuda"))
    gpu.syncs      # host synchronisations, each with the line of the package that caused it

A tensor of it refuses to meet CPU tensors where a CUDA kernel would, and tensors of another GPU. What makes
the host wait for the device is recorded: reading a value (`item`, `tolist`, `bool`), results whose size
depends on data (`nonzero`, boolean masks), and copies between host and device, except those from pinned
memory with `non_blocking=True`. That is the list of `torch.cuda.set_sync_debug_mode`, plus asynchronous
copies from pageable memory, before which CUDA waits too.

To C++ the tensors are on torch's "meta" device, the only one besides the CPU that a CPU build can
differentiate on; Python sees `cuda:<index>`. Everything is undone when the context ends. Not covered:
bfloat16 autocast (a CPU build switches it off, so results compare exactly), several streams, and kernels
that CUDA lacks.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import blm

PACKAGE = Path(blm.__file__).parent
ROOT = PACKAGE.parent
HIDDEN = torch.device("meta")
"""The device of the tensors in C++."""
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount"}
READS |= {"unique_consecutive", "_unique", "_unique2", "unique_dim", "unique_dim_consecutive"}
"""Operators that make the host wait for a value or a size."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
"""Operators whose index tensors may be on the CPU; they are copied."""
TAKES_CPU_SCALARS = {"fill", "fill_", "masked_fill", "masked_fill_", "where", "lerp", "lerp_"}
"""Operators besides the pointwise ones that accept a CPU tensor without dimensions."""


_OURS = {__file__, contextlib.__file__}
"""Files that are never the cause."""


class DeviceMismatchError(RuntimeError):
    """Tensors met that CUDA refuses to compute with."""


@dataclass(frozen=True)
class Sync:
    """One wait of the host for the device."""

    kind: str
    where: str
    """File and line of the package, or of the caller of torch if the package is not on the stack."""
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
            device=HIDDEN,
            requires_grad=requires_grad,
        )
        made.elem, made.index = elem, index
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.index)

    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def get_device(self) -> int:
        return self.index

    def tolist(self) -> Any:
        _record("tolist")
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
class _State(threading.local):
    """What the call in progress of this thread aims at."""

    index: int | None = None
    """GPU that a factory or a copy makes its result on; None: no GPU was named."""
    last: int = 0
    """GPU of the last operator, for tensors that C++ makes from the options of another tensor."""
    meta: bool = False
    """Whether torch's own "meta" device was named."""


_state = _State()
_log: list[Sync] = []


def _record(kind: str) -> None:
    _log.append(Sync(kind, *_where(), threading.current_thread().name))


def _where() -> tuple[str, str]:
    """The innermost line of the package on the stack, and the innermost outside torch and this file."""
    frame, outer = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if not outer and name not in _OURS and f"{os.sep}torch{os.sep}" not in name:
            outer = f"{Path(name).name}:{frame.f_lineno}"
        if name.startswith(str(PACKAGE) + os.sep):
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}", outer
        frame = frame.f_back  # type: ignore[assignment]
    return outer, outer


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values, if CUDA would run it, and record whether the host would wait."""
    name = func.overloadpacket.__name__
    tensors = list(_tensors((args, *kwargs.values())))
    ours = [x for x in tensors if isinstance(x, GpuTensor)]
    target = kwargs.get("device")
    target = None if target is None else torch.device(target)
    to_gpu = target is not None and target.type == HIDDEN.type and not _state.meta
    if not ours and not to_gpu:
        return func(*args, **kwargs)
    aim = _state.last if _state.index is None else _state.index
    index = _state.last = ours[0].index if ours else aim
    _require_one_device(func, name, args, tensors)
    _record_waits(func, name, args, kwargs, ours)
    _refuse_generator(kwargs, name)
    inner: dict[str, Any] = {**kwargs, "device": torch.device("cpu")} if to_gpu else kwargs
    out = func(*_map(_unwrap, args), **{key: _map(_unwrap, x) for key, x in inner.items()})
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
    """The tensors among the arguments of an operator."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for part in x:
            yield from _tensors(part)


def _map(change: Callable[[Any], Any], x: Any) -> Any:
    """Change what is in lists and tuples; several times faster than torch's `tree_map`."""
    if isinstance(x, list | tuple):
        return type(x)([_map(change, part) for part in x])
    return change(x)


def _unwrap(x: Any) -> Any:
    return x.elem if isinstance(x, GpuTensor) else x


def _require_one_device(func: Any, name: str, args: Any, tensors: list[Any]) -> None:
    ours = [x for x in tensors if isinstance(x, GpuTensor)]
    if len({x.index for x in ours}) > 1:
        raise DeviceMismatchError(
            f"{name}: tensors on {sorted({str(x.device) for x in ours})} at {_where()[0]}"
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
            f"{name}: {ours[0].device} meets CPU tensors of shape {shapes} at {_where()[0]}"
        )


def _record_waits(func: Any, name: str, args: Any, kwargs: dict[str, Any], ours: list[GpuTensor]) -> None:
    if (name in READS and ours) or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        _record(name)
    elif name in INDEXING:
        places = [x for x in args[1] if x is not None]
        filled = "put" in name and len(places) == 1 and args[2].numel() == 1
        if any(x.dtype in (torch.bool, torch.uint8) for x in places) and not filled:
            _record("boolean mask")
        if any(not isinstance(x, GpuTensor) for x in places):
            _record("index from the CPU")
    elif name == "copy_" and isinstance(args[0], GpuTensor) != isinstance(args[1], GpuTensor):
        blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        _record_copy(args[1], blocking, into=args[0])
    elif name == "_to_copy" and kwargs.get("device") is not None:
        to_gpu = torch.device(kwargs["device"]).type == HIDDEN.type
        if to_gpu != isinstance(args[0], GpuTensor):
            _record_copy(args[0], not kwargs.get("non_blocking"))


def _record_copy(source: Tensor, blocking: bool, into: Tensor | None = None) -> None:
    to_gpu = not isinstance(source, GpuTensor)
    host = source if to_gpu else into
    if blocking or host is None or not getattr(host, "pinned", False):
        _record("copy to the device" if to_gpu else "copy to the host")


def _refuse_generator(kwargs: dict[str, Any], name: str) -> None:
    if kwargs.get("generator") is not None:
        raise DeviceMismatchError(f"{name}: a CPU generator for a tensor on a GPU at {_where()[0]}")


M = TypeVar("M", bound=nn.Module)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _gpu_of(x: Any) -> int | None:
    """The index of the GPU that a device names, as `cuda`, `"cuda:3"` or a tensor of it; else None."""
    if isinstance(x, GpuTensor):
        return x.index
    if isinstance(x, str) and x.startswith("cuda"):
        x = torch.device(x)
    if isinstance(x, torch.device) and x.type == "cuda":
        return x.index if x.index is not None else torch.cuda.current_device()
    return None


class _Function(TorchFunctionMode):
    """Sends calls that name a CUDA device to the pretended one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._nn._parse_to:  # it reads the arguments of Module.to
            return func(*args, **kwargs)
        if special := _SPECIAL.get(func):
            return special(func, *args, **kwargs)
        if func is torch.Tensor.to or func is torch.Tensor.cuda:
            return _to(func, args, kwargs)
        device = kwargs.get("device")
        index = _gpu_of(device) if device is not None else None
        if index is None:
            with _naming_meta(device):
                return func(*args, **kwargs)
        with _aiming(index):
            return func(*args, **{**kwargs, "device": HIDDEN})


@contextlib.contextmanager
def _aiming(index: int) -> Iterator[None]:
    before, _state.index = _state.index, index
    try:
        yield
    finally:
        _state.index = before


@contextlib.contextmanager
def _naming_meta(*devices: Any) -> Iterator[None]:
    before = _state.meta
    _state.meta = before or any(str(x) == "meta" for x in devices if isinstance(x, str | torch.device))
    try:
        yield
    finally:
        _state.meta = before


def _to(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is torch.Tensor.cuda:
        device = kwargs.pop("device", args[1] if len(args) > 1 else "cuda")
        func, args = torch.Tensor.to, (args[0], device if device is not None else "cuda")
    named = {name: x for name, x in kwargs.items() if name in ("device", "other")}
    indices = [index for x in (*args[1:], *named.values()) if (index := _gpu_of(x)) is not None]
    if not indices:
        with _naming_meta(*args[1:], *named.values()):
            return func(*args, **kwargs)
    (index,) = indices
    if isinstance(args[0], GpuTensor) and args[0].index != index:
        raise DeviceMismatchError(f"a copy from {args[0].device} to cuda:{index} at {_where()[0]}")

    def aimed(x: Any) -> Any:
        return HIDDEN if _gpu_of(x) is not None and not isinstance(x, GpuTensor) else x

    with _aiming(index):
        return func(args[0], *map(aimed, args[1:]), **{name: aimed(x) for name, x in kwargs.items()})


def _tensor(func: Any, data: Any, **kwargs: Any) -> Any:
    """`torch.tensor` and `torch.as_tensor`: the values are copied from the host."""
    device = kwargs.pop("device", None)
    index = _gpu_of(device) if device is not None else None
    if isinstance(data, torch.Tensor) and func is torch.as_tensor:
        named = {"device": device or data.device, "dtype": kwargs.get("dtype") or data.dtype}
        return _to(torch.Tensor.to, (data,), named)
    if index is None:
        return func(data, **kwargs, **({} if device is None else {"device": device}))

    def read(x: Any) -> Any:
        if isinstance(x, GpuTensor):
            _record("item")
            return x.elem.item()
        return x

    made = func(tree_map(read, data), **kwargs)
    _record("copy to the device")
    return GpuTensor(made, index)


def _new_tensor(func: Any, self: Tensor, data: Any, **kwargs: Any) -> Any:
    if not isinstance(self, GpuTensor):
        return func(self, data, **kwargs)
    return _tensor(torch.tensor, data, **{"dtype": self.dtype, "device": self.device, **kwargs})


def _one_hot(func: Any, tensor: Tensor, num_classes: int = -1) -> Tensor:
    """On CUDA the host does not check the classes; without their number it must read the highest."""
    if not isinstance(tensor, GpuTensor):
        return func(tensor, num_classes)
    if num_classes < 0:
        _record("one_hot")
    return GpuTensor(func(tensor.elem, num_classes), tensor.index)


def _attention(
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Take the kernel that the CPU would take, so that results are equal to the bit."""
    named: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if isinstance(query, GpuTensor):
        inner = (_unwrap(x) for x in (query, key, value, attn_mask))
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        q, k, v, mask = (
            x.detach().requires_grad_(needs_grad and x.is_floating_point()) if x is not None else None
            for x in inner
        )
        if torch._fused_sdp_choice(q, k, v, mask, dropout_p, is_causal, **named) == 1:
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
                attn_mask = zeros.masked_fill_(attn_mask.logical_not(), float("-inf"))
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
    return func(query, key, value, attn_mask, dropout_p, is_causal, **named)


def _pin_memory(func: Any, self: Tensor, *args: Any) -> Tensor:
    if isinstance(self, GpuTensor):
        raise DeviceMismatchError(f"only CPU tensors can be pinned, at {_where()[0]}")
    made = self.clone()
    made.pinned = True  # type: ignore[attr-defined]
    return made


_SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.tensor: _tensor,
    torch.as_tensor: _tensor,
    torch.Tensor.new_tensor: _new_tensor,
    F.one_hot: _one_hot,
    F.scaled_dot_product_attention: _attention,
    torch.Tensor.pin_memory: _pin_memory,
}


class PretendedGpu:
    """Machine with pretended GPUs, of which `index` is the current one, for as long as the context lasts."""

    def __init__(self, current: int = 0) -> None:
        self.current = current
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> PretendedGpu:
        _log.clear()
        no_state = torch.zeros(16, dtype=torch.uint8)
        submit = concurrent.futures.ThreadPoolExecutor.submit

        def submit_active(pool: Any, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            def call() -> Any:
                with self.active():
                    return fn(*args, **kwargs)

            return submit(pool, call)

        run_backward = torch.autograd._engine_run_backward

        def run_backward_active(*args: Any, **kwargs: Any) -> Any:
            with _Function():  # off while it handles `backward`, but blocks may be computed again there
                return run_backward(*args, **kwargs)

        enter = self._stack.enter_context
        for target, name, value in (
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "current_device", lambda: self.current),
            (torch.cuda, "get_rng_state", lambda device=None: no_state),
            (torch.cuda, "set_rng_state", lambda state, device=None: None),
            (torch.autograd, "_engine_run_backward", run_backward_active),
            (concurrent.futures.ThreadPoolExecutor, "submit", submit_active),
        ):
            enter(mock.patch.object(target, name, value))
        swap = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        self._stack.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        enter(warnings.catch_warnings())
        warnings.filterwarnings("ignore", ".* Disabling autocast", UserWarning)
        enter(self.active())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make the devices known to the calling thread; thread pools in the context do it themselves."""
        with _Function(), _Dispatch():
            yield

    @property
    def syncs(self) -> list[Sync]:
        return list(_log)

    @contextlib.contextmanager
    def counting(self) -> Iterator[list[Sync]]:
        """Collect the synchronisations of a block that this thread causes."""
        found: list[Sync] = []
        begin, name = len(_log), threading.current_thread().name
        yield found
        found += [sync for sync in _log[begin:] if sync.thread == name]

    @contextlib.contextmanager
    def training_steps(self) -> Iterator[list[list[Sync]]]:
        """Collect the synchronisations of this thread from each step of AdamW to the next.

        The first step, which fills caches, and the checkpoint after the last one are not among them.
        """
        found: list[list[Sync]] = []
        marks, name = list[int](), threading.current_thread().name

        def mark(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if isinstance(optimizer, torch.optim.AdamW):
                marks.append(len(_log))

        handle = register_optimizer_step_post_hook(mark)
        try:
            yield found
        finally:
            handle.remove()
        found += [[s for s in _log[a:b] if s.thread == name] for a, b in itertools.pairwise(marks)]


def on_gpu(module: M, device: str = "cuda") -> M:
    """Move a module; its parameters stay the same objects, so tied ones stay tied."""
    return module.to(torch.device(device))


def table(syncs: list[Sync]) -> str:
    """The synchronisations by place, the most frequent first."""
    counts = Counter((sync.kind, sync.where, sync.via) for sync in syncs)
    return "\n".join(
        f"{count:4}  {kind:20} {where}" + (f"  via {via}" if via.split(":")[0] not in where else "")
        for (kind, where, via), count in counts.most_common()
    )


def values(x: Any) -> Any:
    """Tensors of any nesting on the CPU, without counting."""
    return tree_map(lambda t: t.elem.detach() if isinstance(t, GpuTensor) else t, x)
