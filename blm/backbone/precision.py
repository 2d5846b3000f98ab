"""Device, weight precision and attention implementation with which a backbone is loaded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypedDict

import torch
from torch import nn
from transformers import PreTrainedModel

from blm.backbone.compilation import CompileMode
from blm.types import BlmError, lookup

WeightDtype = Literal["float32", "bfloat16"]


class BackboneOptions(TypedDict, total=False):
    """Form in which a backbone is loaded."""

    device: str
    dtype: WeightDtype | None
    attn_implementation: str | None


class LoadOptions(BackboneOptions, total=False):
    """Form in which the model of a checkpoint is loaded."""

    compile: CompileMode


ATTENTION_IMPLEMENTATIONS = {
    name: name for name in ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
}
"""Names of attention implementations in transformers that a backbone may be loaded with."""


def frozen_dtype(
    device: str | torch.device, dtype: WeightDtype | None = None, *, flag: str = "--dtype"
) -> torch.dtype:
    """Return the precision of frozen weights, and of the products in a loss, on a device: `dtype`,
    or by default bfloat16 on CUDA and float32 elsewhere.

    Raises BlmError, which names `flag`, for bfloat16 on a GPU that does not support it.
    """
    on_cuda = torch.device(device).type == "cuda"
    chosen: torch.dtype = getattr(torch, dtype or ("bfloat16" if on_cuda else "float32"))
    if on_cuda and chosen is torch.bfloat16 and not _supports_bfloat16(device):
        raise BlmError(f"the GPU '{device}' does not support bfloat16; give {flag} float32")
    return chosen


def _supports_bfloat16(device: str | torch.device) -> bool:
    if not torch.cuda.is_available():
        return True
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def place_weights(
    model: nn.Module,
    device: str | torch.device,
    dtype: torch.dtype,
    float32: Callable[[str], bool] | None = None,
) -> None:
    """Move a model to a device and convert its floating-point weights to `dtype`.

    Parameters whose name `float32` accepts become float32 instead: those that will be trained.

    Buffers that a model computes when it is made, such as the frequencies of rotary positions, keep
    their precision: in bfloat16 the angles of distant positions would be wrong. On CUDA, float32
    matrix products may use TF32 from here on.
    """
    stored = model.state_dict().keys()
    computed = {name: buffer for name, buffer in model.named_buffers() if name not in stored}
    if float32 is not None:  # before the copy to the device, where memory is scarce
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.float32 if float32(name) else dtype)
        for name, buffer in model.named_buffers():
            if name not in computed and buffer.is_floating_point():
                buffer.data = buffer.data.to(dtype)
    model.to(device=device, dtype=None if float32 is not None else dtype)
    for name, buffer in computed.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(device))
    if torch.device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True


def is_mixed(model: nn.Module) -> bool:
    """Return whether parameters differ in precision: frozen ones in bfloat16, trained in float32."""
    return len({p.dtype for p in model.parameters() if p.is_floating_point()}) > 1


def mixed_precision(model: nn.Module) -> AbstractContextManager[object]:
    """Return the context in which a model can run: bfloat16 autocast if it `is_mixed`."""
    if not is_mixed(model):
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16)


def require_attention(name: str | None) -> None:
    """Raise UnknownNameError, which lists the valid names, for an unknown attention
    implementation."""
    if name is not None:
        lookup("attention implementation", name, ATTENTION_IMPLEMENTATIONS)


def use_attention(model: PreTrainedModel, name: str | None) -> None:
    """Switch a model to an attention implementation of transformers; None keeps the model's own.

    Raises UnknownNameError for an unknown name, and BlmError if this installation or model lacks
    the implementation.
    """
    require_attention(name)
    if name is None:
        return
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BlmError(
            f"{type(model).__name__} cannot use the attention implementation '{name}': {reason}"
        ) from error
