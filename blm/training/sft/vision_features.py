"""Vision features: computed by the vision tower, or cached once per distinct image.

Two outputs can be cached in place of pixels. If tower and projector are frozen: the output of both,
for any model. If the projector behind the tower is trained: the input of the projector, which is
then applied to the cached input in every step. Qwen-VL's projector (its merger, for Qwen3-VL also
the DeepStack mergers) is a part of the tower; its input is cached just the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from blm.backbone import Backbone, Inputs
from blm.backbone.precision import mixed_precision
from blm.training.sft.parameter_groups import part_of, projector_names
from blm.training.sft.tokenize import VisionInputs, concatenate_vision_inputs
from blm.types import BlmError

PICTURES_PER_PASS = 64
"""Maximum number of images in one pass of the vision tower."""
ROWS_PER_PASS = 2**16
"""Maximum number of rows of pixel inputs in one pass: for Qwen-VL, patches."""
PictureFeatures = dict[str, Tensor]
"""Of one image or several, either the input of the projector: "tower_features" [images, tokens,
width] (Qwen-VL: [patches, width]) with, for Qwen3-VL, "deepstack_tower_features" [patches, blocks,
width]; or its output: "picture_features" [tokens, width] with, for Qwen3-VL, "deepstack_features"
[tokens, blocks, width]. Of a video, the names begin with "video_"."""
VIDEO_PREFIX = "video_"
GRIDS = {"image_grid_thw": "pixel_values", "video_grid_thw": "pixel_values_videos"}
"""Grid sizes of images and of videos -> their patches, concatenated."""


class PooledFeatures(list[Tensor]):
    """Features [tokens, width] of one or several images each.

    Some models of transformers concatenate a list of tensors, others call `to` on one tensor; this
    serves both.
    """

    def to(self, *arguments: Any) -> Tensor:
        """Return all features [tokens, width] as one tensor, converted as `Tensor.to` does."""
        return torch.cat(list(self)).to(*arguments)


@dataclass
class VisionOutput(BaseModelOutputWithPooling):
    """Cached features in the form of the output of transformers' vision towers."""

    pooler_output: Any = None
    """Tensors [tokens, width], of one or several images each."""
    deepstack_features: Any = None
    """Qwen3-VL: the same for each of its DeepStack blocks."""


def vision_modules(backbone: Backbone) -> list[nn.Module]:
    """Return vision tower and projector: the modules apart from the decoder.

    Empty for a model of text only.
    """
    parts = backbone.model.base_model.children()
    return [part for part in parts if not any(module is backbone.decoder for module in part.modules())]


def is_frozen(module: nn.Module) -> bool:
    """Return whether no parameter of a module is trained."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def encode_all(backbone: Backbone, pictures: Mapping[str, Inputs]) -> dict[str, PictureFeatures]:
    """Return the features of images by key, on the CPU; those of one size share passes.

    Raises BlmError unless the vision tower is frozen.
    """
    encoded: dict[str, PictureFeatures] = {}
    groups = defaultdict[object, list[str]](list)
    for key, picture in pictures.items():
        grids = tuple(tuple(picture[name].flatten().tolist()) for name in GRIDS if name in picture)
        groups[grids, tuple((name, value.shape) for name, value in picture.items())].append(key)
    for group in groups.values():
        rows = max(len(value) for value in pictures[group[0]].values())
        size = max(1, min(PICTURES_PER_PASS, ROWS_PER_PASS // rows))
        for begin in range(0, len(group), size):
            keys = group[begin : begin + size]
            batch = {name: torch.cat([pictures[key][name] for key in keys]) for name in pictures[keys[0]]}
            features = encode_pictures(backbone, batch)
            split = {name: value.split(len(value) // len(keys)) for name, value in features.items()}
            for index, key in enumerate(keys):
                encoded[key] = {name: parts[index] for name, parts in split.items()}
    return encoded


@torch.no_grad()
def encode_pictures(backbone: Backbone, vision_inputs: Inputs) -> PictureFeatures:
    """Return the features to cache for an image, or for several, on the CPU.

    Raises BlmError unless the vision tower is frozen.
    """
    projectors = trained_projectors(backbone)
    modules = vision_modules(backbone)
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        if projectors:
            with mixed_precision(backbone.model):
                return _projector_inputs(backbone, projectors, vision_inputs)
        output = vision_features(backbone, backbone.place(vision_inputs))
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
    prefix = VIDEO_PREFIX if "video_grid_thw" in vision_inputs else ""
    features = {f"{prefix}picture_features": torch.cat(list(output.pooler_output)).cpu()}
    if deepstack := getattr(output, "deepstack_features", None):
        layers = [torch.cat(list(layer)) for layer in deepstack]
        features[f"{prefix}deepstack_features"] = torch.stack(layers, dim=1).cpu()
    return features


def _projector_inputs(
    backbone: Backbone, projectors: Sequence[nn.Module], vision_inputs: Inputs
) -> PictureFeatures:
    """Return what enters the projectors, in the order in which the language model reads their
    outputs.

    A model may reorder the tokens behind its projector (Qwen2.5-VL computes them window by window).
    To find out, each projector outputs the numbers of its tokens instead of features.
    """
    given = dict[nn.Module, Tensor]()

    def number_tokens(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        given[module] = inputs[0]
        numbers = torch.arange(output.shape[:-1].numel(), dtype=torch.float32, device=output.device)
        return numbers.view(*output.shape[:-1], 1).expand(output.shape)

    hooks = [projector.register_forward_hook(number_tokens) for projector in projectors]
    try:
        output = vision_features(backbone, backbone.place(vision_inputs))
    finally:
        for hook in hooks:
            hook.remove()
    found = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
    main, *deepstack = (
        _reordered(backbone, given[projector], list(parts))
        for projector, parts in zip(projectors, found, strict=True)
    )
    prefix = VIDEO_PREFIX if "video_grid_thw" in vision_inputs else ""
    features = {f"{prefix}tower_features": main.cpu()}
    if deepstack:
        features[f"{prefix}deepstack_tower_features"] = torch.stack(deepstack, dim=1).cpu()
    return features


def _reordered(backbone: Backbone, tower_features: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    """Return tower features in the order of the token numbers [tokens, width] behind the
    projector.

    Raises BlmError if the model does more than reorder tokens there.
    """
    order = torch.cat([part.reshape(-1, part.shape[-1])[:, 0] for part in numbers])
    in_order = torch.arange(len(order), device=order.device)
    if torch.equal(order, in_order.to(order.dtype)):
        return tower_features
    same_tokens = torch.equal(order.sort().values, in_order.to(order.dtype))
    if not same_tokens or tower_features.ndim != 2 or len(tower_features) % len(order):
        raise BlmError(
            f"the vision features of {type(backbone.model).__name__} cannot be cached while its projector "
            "is trained: it changes them behind the projector. Set projector_scale=0, or "
            "cache_features=False"
        )
    patches = tower_features.view(len(order), -1, tower_features.shape[-1])  # of each token
    return patches[order.long()].flatten(0, 1)


def vision_features(backbone: Backbone, inputs: Inputs) -> Any:
    """Return the vision features of the images, or of the cached features, among `inputs`.

    Like the output of `get_image_features` of transformers the result has `pooler_output` and, for
    Qwen3-VL, `deepstack_features`. A video among `inputs` must come without images.
    """
    base: Any = backbone.model.base_model
    if "tower_features" in inputs:
        main, *others = projectors_of(backbone)
        pooled = PooledFeatures([main(inputs["tower_features"]).flatten(0, -2)])
        deepstack = inputs.get("deepstack_tower_features")
        given = deepstack.unbind(1) if deepstack is not None else ()
        projected = [[module(layer.contiguous())] for module, layer in zip(others, given, strict=True)]
        return VisionOutput(pooler_output=pooled, deepstack_features=projected or None)
    if "picture_features" in inputs:
        deepstack = inputs.get("deepstack_features")
        layers = [[layer] for layer in deepstack.unbind(1)] if deepstack is not None else None
        return VisionOutput(
            pooler_output=PooledFeatures([inputs["picture_features"]]), deepstack_features=layers
        )
    of_text = ("input_ids", "attention_mask", "position_ids")
    pictures = {name: value for name, value in inputs.items() if name not in of_text}
    if "video_grid_thw" in pictures:
        return base.get_video_features(**pictures, return_dict=True)
    return base.get_image_features(**pictures, return_dict=True)


def forward_arguments(backbone: Backbone, inputs: Inputs) -> dict[str, Any]:
    """Return the arguments of the model's forward; cached features replace the vision tower."""
    if not any(name.endswith("_features") for name in inputs):
        return dict(inputs)
    others = {name: value for name, value in inputs.items() if not name.endswith("_features")}
    pictures = {name: value for name, value in inputs.items() if name not in others}
    names = [name for name in pictures if name.startswith(VIDEO_PREFIX)]
    videos = {name.removeprefix(VIDEO_PREFIX): pictures.pop(name) for name in names}
    cached = {"image": pictures, "video": videos}
    outputs = {kind: vision_features(backbone, features) for kind, features in cached.items() if features}
    return {**others, "mm_encoder_outputs": outputs}


def trained_projectors(backbone: Backbone) -> list[nn.Module]:
    """Return the projectors if one of them is trained; empty if no vision parameter is trained.

    Raises BlmError if any other vision parameter is trained.
    """
    projectors = projectors_of(backbone)
    own = {id(parameter) for projector in projectors for parameter in projector.parameters()}
    trained = [
        name
        for name, parameter in backbone.model.base_model.named_parameters()
        if parameter.requires_grad and part_of(name) in ("vision", "projector") and id(parameter) not in own
    ]
    if trained:
        raise BlmError(
            f"the vision features of {type(backbone.model).__name__} cannot be cached, because "
            f"'{trained[0]}' is trained; set vision_scale=0, or cache_features=False"
        )
    return projectors if not all(map(is_frozen, projectors)) else []


def projectors_of(backbone: Backbone) -> list[nn.Module]:
    """Return the projector, for Qwen3-VL followed by those of its DeepStack blocks."""
    names = projector_names(backbone.model)
    return [backbone.model.get_submodule(name) for name in names]


def split_pictures(vision_inputs: VisionInputs) -> list[Inputs]:
    """Split vision inputs into those of single images (SmolVLM: tiles), then of single videos."""
    if not vision_inputs:
        return []
    whole = concatenate_vision_inputs([vision_inputs])
    if GRIDS.keys() & whole.keys():
        single = list[Inputs]()
        for name, pixels in GRIDS.items():
            grids = whole.get(name, torch.zeros(0, 3, dtype=torch.long))
            patches = whole[pixels].split(grids.prod(-1).tolist()) if len(grids) else ()
            single += [{pixels: p, name: g[None]} for p, g in zip(patches, grids, strict=True)]
        return single
    parts = {name: value.split(1) for name, value in whole.items()}
    return [dict(zip(parts, picture, strict=True)) for picture in zip(*parts.values(), strict=True)]


def collect(pictures: Sequence[PictureFeatures]) -> VisionInputs:
    """Return the features of images one after another, as the inputs of an example."""
    names = dict.fromkeys(name for picture in pictures for name in picture)
    return {name: tuple(picture[name] for picture in pictures if name in picture) for name in names}
