"""Calls of torch that name a CUDA device, redirected to the pretended GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tests.support.pretended_gpu.tensor import (
    META,
    DeviceMismatchError,
    GpuTensor,
    call_site,
    current_call,
    dispatch,
    record_sync,
    unwrap,
)


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def gpu_index(x: Any) -> int | None:
    """Return the index of a GPU given as device, string or tensor; None for other devices."""
    if isinstance(x, GpuTensor):
        return x.index
    if isinstance(x, str) and x.startswith("cuda"):
        x = torch.device(x)
    if isinstance(x, torch.device) and x.type == "cuda":
        return x.index if x.index is not None else torch.cuda.current_device()
    return None


class FunctionMode(TorchFunctionMode):
    """Redirects calls that name a CUDA device to the pretended one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._nn._parse_to:  # it reads the arguments of Module.to
            return func(*args, **kwargs)
        if special := _SPECIAL.get(func):
            return special(func, *args, **kwargs)
        if func is torch.Tensor.to or func is torch.Tensor.cuda:
            return _to(func, args, kwargs)
        device = kwargs.get("device")
        index = gpu_index(device) if device is not None else None
        if index is None:
            with _naming_meta(device):
                return func(*args, **kwargs)
        with _aiming(index):
            return func(*args, **{**kwargs, "device": META})


@contextlib.contextmanager
def _aiming(index: int) -> Iterator[None]:
    before, current_call.index = current_call.index, index
    try:
        yield
    finally:
        current_call.index = before


@contextlib.contextmanager
def _naming_meta(*devices: Any) -> Iterator[None]:
    before = current_call.meta
    current_call.meta = before or any(str(x) == "meta" for x in devices if isinstance(x, str | torch.device))
    try:
        yield
    finally:
        current_call.meta = before


def _to(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is torch.Tensor.cuda:
        device = kwargs.pop("device", args[1] if len(args) > 1 else "cuda")
        func, args = torch.Tensor.to, (args[0], device if device is not None else "cuda")
    named = {name: x for name, x in kwargs.items() if name in ("device", "other")}
    indices = [index for x in (*args[1:], *named.values()) if (index := gpu_index(x)) is not None]
    if not indices:
        with _naming_meta(*args[1:], *named.values()):
            return func(*args, **kwargs)
    (index,) = indices
    if isinstance(args[0], GpuTensor) and args[0].index != index:
        raise DeviceMismatchError(f"a copy from {args[0].device} to cuda:{index} at {call_site()[0]}")

    def aimed(x: Any) -> Any:
        return META if gpu_index(x) is not None and not isinstance(x, GpuTensor) else x

    with _aiming(index):
        return func(args[0], *map(aimed, args[1:]), **{name: aimed(x) for name, x in kwargs.items()})


def _tensor(func: Any, data: Any, **kwargs: Any) -> Any:
    """Replace `torch.tensor` and `torch.as_tensor`, which copy values from the host."""
    device = kwargs.pop("device", None)
    index = gpu_index(device) if device is not None else None
    if isinstance(data, torch.Tensor) and func is torch.as_tensor:
        named = {"device": device or data.device, "dtype": kwargs.get("dtype") or data.dtype}
        return _to(torch.Tensor.to, (data,), named)
    if index is None:
        return func(data, **kwargs, **({} if device is None else {"device": device}))

    def read(x: Any) -> Any:
        if isinstance(x, GpuTensor):
            record_sync("item")
            return x.elem.item()
        return x

    made = func(tree_map(read, data), **kwargs)
    record_sync("copy to the device")
    return GpuTensor(made, index)


def _new_tensor(func: Any, self: Tensor, data: Any, **kwargs: Any) -> Any:
    if not isinstance(self, GpuTensor):
        return func(self, data, **kwargs)
    return _tensor(torch.tensor, data, **{"dtype": self.dtype, "device": self.device, **kwargs})


def _one_hot(func: Any, tensor: Tensor, num_classes: int = -1) -> Tensor:
    """Replace `one_hot`: on CUDA the host only reads values if `num_classes` is missing."""
    if not isinstance(tensor, GpuTensor):
        return func(tensor, num_classes)
    if num_classes < 0:
        record_sync("one_hot")
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
    """Use the kernel that the CPU would use, so that results are bit-equal."""
    named: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if isinstance(query, GpuTensor):
        inner = (unwrap(x) for x in (query, key, value, attn_mask))
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
        raise DeviceMismatchError(f"only CPU tensors can be pinned, at {call_site()[0]}")
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
