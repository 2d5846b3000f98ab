"""Measure the memory of tensors in a piece of work, with real tensors or with ones without values.

A tensor without values (`empty`) has a shape, a precision and a device, but takes no memory:
operators on it compute shapes only. So a training step of a 7B model runs in seconds, and what
autograd keeps for the backward pass is what the real step keeps. Tensors of indices, masks and grid
sizes stay real, because models read values from them.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

M = TypeVar("M", bound=nn.Module)


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that exist, from inside the operators that create them.

    A context manager. Memory that views share counts once. Working memory inside an operator is not
    seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes of tensors now."""
        self.peak = 0
        """Largest value of `live` so far; assign `live` to begin anew."""
        self._storages = dict[int, weakref.finalize]()

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were created outside, such as the weights of a model."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._storages or size == 0:
                continue
            self._storages[key] = weakref.finalize(storage, self._remove, key, size)
            self.live += size
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int, size: int) -> None:
        del self._storages[key]
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.equal.default and any(isinstance(x, FakeTensor) for x in args):
            return True  # values that do not exist: the models compare the order of tokens
        result = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


@cache
def _without_values() -> FakeTensorMode:
    """Return the mode that makes tensors without values: only those of one mode can meet."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without values, on the CPU."""
    with _without_values():
        return torch.empty(shape, dtype=dtype, device="cpu")


def strip_values(
    module: M, dtype: torch.dtype | None = None, float32: Callable[[str], bool] | None = None
) -> M:
    """Replace the parameters of a module, in place, by ones without values, on the CPU.

    Tied parameters stay tied. Floating-point parameters get the precision `dtype`, if given, and
    float32 if `float32` accepts their name, as in `place_weights`. Buffers keep their values, except
    those on the meta device, which have none.
    """
    made = dict[nn.Parameter, nn.Parameter]()
    for prefix, part in module.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    whole = float32 is not None and float32(f"{prefix}.{name}")
                    made[parameter] = _stripped(parameter, torch.float32 if whole else dtype)
                part._parameters[name] = made[parameter]
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = empty(*buffer.shape, dtype=buffer.dtype)
    return module


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings about tensors without values: copies look at their addresses, and operators at
    their gradients, neither of which matters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        yield


def _stripped(parameter: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    kind = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
    if isinstance(parameter, FakeTensor) and parameter.dtype == kind:
        return parameter
    return nn.Parameter(empty(*parameter.shape, dtype=kind), requires_grad=parameter.requires_grad)
