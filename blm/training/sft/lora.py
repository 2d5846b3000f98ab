"""LoRA: low-rank adapters in the language model, through `peft`.

The projector may be trained fully as well. Hu et al., "LoRA: Low-Rank Adaptation of Large Language
Models", 2021: W x + (alpha / rank) B A x, with B = 0 at the start. The adapters are modules inside
the backbone's model, so the training loop and `Backbone.tap` need no special case.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from blm.backbone import Backbone
from blm.backbone.four_bit import dequantized, is_quantized, quantize, restore
from blm.backbone.saving import save_folder
from blm.io import read_json
from blm.training.sft.parameter_groups import projector_names
from blm.types import BlmError, require_numbers


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters of the language model."""

    rank: int = 0
    """Rank of the adapters; 0 trains the weights themselves."""
    four_bit: bool = False
    """Store the frozen linear layers of the language model in 4 bits (bitsandbytes), which saves three
    quarters of their memory. The merged model has the weights with which it was trained."""
    alpha: int = 0
    """Scale of the adapters, which are multiplied by alpha / rank; 0 means twice the rank."""
    dropout: float = 0.0
    """Dropout probability at the input of an adapter, in [0, 1)."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the linear layers that get adapters, without their path, such as q_proj.
    The default, all-linear, adapts all linear layers."""

    def __post_init__(self) -> None:
        require_numbers(self, rank=(0, 65_536), alpha=(0, 10**9), dropout=(0, 1))
        if self.rank < 0 or self.alpha < 0 or not 0 <= self.dropout < 1:
            raise BlmError(f"{self}: rank and alpha may not be negative, dropout must lie in 0 .. 1")
        if self.four_bit and not self.rank:
            raise BlmError("lora.four_bit freezes the weights, so it needs adapters: give lora.rank")

    def facts(self) -> dict[str, Any]:
        """Return what the result depends on, in the form of runs that knew no 4-bit weights."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("four_bit", False)}


def add_adapters(
    backbone: Backbone, lora: Lora, *, projector: bool, seed: int, blocks: int | None = None
) -> peft.PeftModel:
    """Add adapters to the backbone's language model, and freeze all other weights.

    With `projector` the projector is trained, too; with `blocks`, only the first blocks get
    adapters. Raises BlmError for targets that the language model does not have, and for 4-bit weights
    without bitsandbytes or on a device that it does not support.
    """
    if lora.four_bit:
        quantize(backbone)
    (decoder,) = (name for name, part in backbone.model.named_modules() if part is backbone.decoder)
    inside = tuple(f"layers.{number}." for number in range(blocks)) if blocks is not None else ("",)
    linear = [
        f"{decoder}.{name}"
        for name, part in backbone.decoder.named_modules()
        if isinstance(part, nn.Linear) and name.startswith(inside)
    ]
    chosen = linear
    if lora.targets != ("all-linear",):
        chosen = [name for name in linear if name.rsplit(".", 1)[-1] in lora.targets]
        if missing := set(lora.targets) - {name.rsplit(".", 1)[-1] for name in chosen}:
            valid = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise BlmError(
                f"lora.targets {sorted(missing)} are not linear layers of this model; valid: {valid}"
            )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls transformers by a deprecated name
        torch.manual_seed(seed)
        return peft.get_peft_model(
            backbone.model,
            peft.LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha or 2 * lora.rank,
                lora_dropout=lora.dropout,
                target_modules=chosen,
                modules_to_save=projector_names(backbone.model) if projector else None,
            ),
        )


def merge_adapters(backbone: Backbone, adapted: peft.PeftModel, folder: Path | None) -> None:
    """Save the adapters in peft's format to `folder`, if given, and merge them into the weights.

    They are added in float32, and the sums rounded to the precision of the weights. Afterwards the
    model is a stock transformers model again.
    """
    if folder is not None:
        save_folder(folder, lambda work: adapted.save_pretrained(str(work), safe_serialization=True))
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer) and is_quantized(layer.get_base_layer()):
            _merge_quantized(layer)
        elif isinstance(layer, LoraLayer):
            weight: Any = layer.get_base_layer().weight
            precision = weight.dtype
            weight.data = weight.data.float()
            layer.merge()
            weight.data = weight.data.to(precision)
    merged: Any = adapted.unload()
    assert merged is backbone.model
    restore(backbone)


def read_factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return B [out, r] and A [r, in] of every adapted weight, by its name in the backbone's model.

    `folder` is that of `merge_adapters`; B contains the scale. Raises BlmError for other folders.
    """
    files = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if missing := [file.name for file in files if not file.is_file()]:
        raise BlmError(f"'{folder}' has no {missing[0]}: it is not the adapter folder of a Stage I with LoRA")
    config, tensors = read_json(files[0]), load_file(files[1])
    scale = config["lora_alpha"] / config["r"]
    ends = {end: f".lora_{end}.weight" for end in "AB"}
    names = [name.removesuffix(ends["A"]) for name in tensors if name.endswith(ends["A"])]
    return {
        f"{name.removeprefix('base_model.model.')}.weight": (
            scale * tensors[name + ends["B"]].float(),
            tensors[name + ends["A"]].float(),
        )
        for name in names
    }


def _merge_quantized(layer: Any) -> None:
    """Give a LoRA layer over 4-bit weights a plain base layer with the adapter added."""
    plain = dequantized(layer.get_base_layer())
    precision = plain.weight.dtype
    plain.weight.data = (plain.weight.data.float() + layer.get_delta_weight("default").float()).to(precision)
    layer.base_layer = plain
