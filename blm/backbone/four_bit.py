"""A language model whose frozen weights have four bits, for LoRA on one GPU (QLoRA).

The linear layers of the decoder are stored as 4-bit NormalFloats by bitsandbytes (Dettmers et al.,
"QLoRA: Efficient Finetuning of Quantized LLMs", 2023): 0.5 bytes a weight instead of 2. Products are
computed in the precision of the other weights. The head, the embeddings and the vision tower keep
theirs.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from blm.backbone.backbone import Backbone
from blm.types import BlmError


def require_four_bit(device: str | torch.device) -> None:
    """Raise BlmError, naming the package or the device, unless 4-bit weights can be used there."""
    if find_spec("bitsandbytes") is None:
        raise BlmError(
            "4-bit weights need the package bitsandbytes, which is not installed: pip install 'blm[four-bit]'"
        )
    if torch.device(device).type == "meta":  # an outline has no weights
        return
    try:
        layer = _quantized(nn.Linear(64, 64), torch.float32).to(device)
        layer(torch.zeros(1, 64, device=device))
    except (RuntimeError, NotImplementedError, AssertionError, ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BlmError(f"bitsandbytes has no 4-bit weights on the device '{device}': {reason}") from error


def quantize(backbone: Backbone) -> int:
    """Replace the linear layers of the decoder by 4-bit layers in place; return their number.

    An outline stays as it is.

    Raises BlmError as `require_four_bit` does.
    """
    device = backbone.model.device
    require_four_bit(device)
    if device.type == "meta":
        return 0
    layers = [(name, part) for name, part in backbone.decoder.named_modules() if isinstance(part, nn.Linear)]
    for name, part in layers:
        owner, _, leaf = name.rpartition(".")
        precision = part.weight.dtype
        setattr(backbone.decoder.get_submodule(owner), leaf, _quantized(part, precision).to(device))
    model: Any = backbone.model
    model.is_loaded_in_4bit = True  # peft then adapts the layers as 4-bit layers
    return len(layers)


def is_quantized(layer: nn.Module) -> bool:
    """Return whether a layer has 4-bit weights."""
    return type(layer).__name__ == "Linear4bit" and type(layer).__module__.startswith("bitsandbytes")


def dequantized(layer: Any) -> nn.Linear:
    """Return a linear layer with the weights with which a 4-bit layer computes."""
    import bitsandbytes

    state = layer.weight.quant_state
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(weight.to(state.dtype), requires_grad=False)
    plain.bias = layer.bias
    return plain


def restore(backbone: Backbone) -> None:
    """Replace the remaining 4-bit layers of the decoder by plain ones, in place."""
    for name, part in list(backbone.decoder.named_modules()):
        if is_quantized(part):
            owner, _, leaf = name.rpartition(".")
            setattr(backbone.decoder.get_submodule(owner), leaf, dequantized(part))
    model: Any = backbone.model
    model.is_loaded_in_4bit = False


def _quantized(layer: nn.Linear, precision: torch.dtype) -> nn.Module:
    """Return a 4-bit copy, which is quantised when it is moved to its device."""
    import bitsandbytes

    made: nn.Module = bitsandbytes.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=precision,
        quant_type="nf4",
    )
    made.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    return made
