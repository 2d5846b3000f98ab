"""Parameter groups: vision tower, projector and language model, by names in transformers models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

from torch import nn

from blm.types import BlmError

PartName = Literal["vision", "projector", "language"]
PARTS: dict[PartName, tuple[str, ...]] = {
    "projector": (
        "multi_modal_projector",  # LLaVA, PaliGemma, Gemma 3, InternVL, nano, smol
        "merger",  # Qwen-VL, inside `visual`
        "deepstack_merger_list",  # Qwen3-VL
        "connector",  # Idefics3, SmolVLM
        "image_newline",  # LLaVA-OneVision: a parameter behind the projector
    ),
    "vision": ("vision_tower", "visual", "vision_model"),
    "language": ("language_model", "text_model", "lm_head"),
}
"""Part of the model -> names of its modules; the first part that matches counts."""


def part_of(name: str) -> PartName | None:
    """Return the part of a parameter or module of this name; None if it belongs to no part."""
    words = set(name.split("."))
    return next((part for part, modules in PARTS.items() if words & set(modules)), None)


def projector_names(model: nn.Module) -> list[str]:
    """Return the names of the outermost modules of the projector that have a forward."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{one}.") for one in found)
        if part_of(name) == "projector" and not inside and not isinstance(module, nn.ModuleList):
            found.append(name)
    return found


def freeze_parts(model: nn.Module, scales: Mapping[PartName, float]) -> dict[str, int]:
    """Train the parts whose scale is above 0, freeze the others; return the trained parameters.

    They are grouped by part. Raises BlmError for a parameter of no known part, and for a scale
    other than 1 of a part that the model does not have, which would have no effect.
    """
    trained: Counter[str] = Counter(dict.fromkeys(scales, 0))
    seen: set[str] = set()
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if part is None:
            raise BlmError(f"'{name}' of {type(model).__name__} belongs to none of {list(PARTS)} (see PARTS)")
        seen.add(part)
        parameter.requires_grad_(scales[part] > 0)
        trained[part] += parameter.numel() * parameter.requires_grad
    for part, scale in scales.items():
        if part not in seen and scale != 1.0:
            raise BlmError(f"{part}_scale is {scale}, but {type(model).__name__} has no {part} parameters")
    return dict(trained)


def train_tower(model: nn.Module, scale: float) -> None:
    """Train the vision tower beside the adapters of a language model, if its scale is above 0.

    Raises BlmError for a scale of a model that has no vision tower.
    """
    tower = [parameter for name, parameter in model.named_parameters() if part_of(name) == "vision"]
    if scale and not tower:
        raise BlmError(f"vision_scale is {scale}, but {type(model).__name__} has no vision parameters")
    for parameter in tower:
        parameter.requires_grad_(scale > 0)
