"""Vision features: computed by the vision tower, or cached once per distinct image.

Two outputs can be cached in place of pixels. If tower and projector are frozen: the output of both,
for any model. If only the projector behind the tower is trained: the input of the projector, for
LLaVA- and SmolVLM-type models.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from blm.backbone import Backbone, Inputs
from blm.backbone.vision_cache import content_key
from blm.training.sft.tokenize import TokenizedExample, VisionInputs, concatenate_vision_inputs
from blm.types import BlmError

PROJECTORS = ("multi_modal_projector", "connector")
"""Names of projectors that are separate modules, behind the vision tower."""
PICTURES_PER_PASS = 64
"""Maximum number of images in one pass of the vision tower."""
PictureFeatures = dict[str, Tensor]
"""Of one image or several: "tower_features" [images, tokens, width], or "picture_features"
[tokens, width] with, for Qwen3-VL, "deepstack_features" [tokens, blocks, width]. Of a video, the
last two names begin with "video_"."""
VIDEO_PREFIX = "video_"
GRIDS = {"image_grid_thw": "pixel_values", "video_grid_thw": "pixel_values_videos"}
"""Grid sizes of images and of videos -> their patches, concatenated."""


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


class VisionFeatureCache:
    """Replaces the pixels of examples by vision features; equal images are encoded once."""

    def __init__(self, backbone: Backbone, counts: Counter[str]) -> None:
        """`counts` gets 'pictures' and 'distinct pictures'.

        Raises BlmError unless the tower is frozen.
        """
        projector = _trained_projector(backbone)
        self.backbone, self.counts = backbone, counts
        self.batch_size = PICTURES_PER_PASS if projector is not None else 1
        self.features: dict[str, PictureFeatures] = {}
        """By the content key of an image."""

    def __call__(self, examples: Sequence[TokenizedExample]) -> list[TokenizedExample]:
        """Return the examples with cached features in place of images."""
        keys = []
        missing = dict[str, Inputs]()
        for example in examples:
            pictures = _split_pictures(example.vision_inputs(self.backbone))
            keyed = [(content_key(picture), picture) for picture in pictures]
            keys.append([key for key, _ in keyed])
            self.counts["pictures"] += len(keyed)
            missing |= {key: picture for key, picture in keyed if key not in self.features}
            if len(missing) >= self.batch_size or example is examples[-1]:
                self.features |= _encode_all(self.backbone, missing, self.batch_size)
                self.counts["distinct pictures"] += len(missing)
                missing = {}
        return [
            replace(example, processor_input=None, features=_collect([self.features[key] for key in own]))
            for example, own in zip(examples, keys, strict=True)
        ]


def _encode_all(
    backbone: Backbone, pictures: Mapping[str, Inputs], batch_size: int
) -> dict[str, PictureFeatures]:
    """Return the features of images by key.

    Those of one shape share a pass if `batch_size` is above 1.
    """
    encoded: dict[str, PictureFeatures] = {}
    groups = defaultdict[object, list[str]](list)
    for number, (key, picture) in enumerate(pictures.items()):
        shapes = tuple((name, value.shape) for name, value in picture.items())
        groups[shapes if batch_size > 1 and not GRIDS.keys() & picture.keys() else number].append(key)
    for keys in groups.values():
        batch = {name: torch.cat([pictures[key][name] for key in keys]) for name in pictures[keys[0]]}
        features = encode_pictures(backbone, batch)
        split = {n: v.split(1) if len(keys) > 1 else (v,) for n, v in features.items()}
        for index, key in enumerate(keys):
            # cloned: a view would be sent to other processes with the whole storage of its batch
            encoded[key] = {name: parts[index].clone() for name, parts in split.items()}
    return encoded


@torch.no_grad()
def encode_pictures(backbone: Backbone, vision_inputs: Inputs) -> PictureFeatures:
    """Return the features to cache for an image, on the CPU.

    If a projector is trained, it may be several images. Raises BlmError unless the vision tower is
    frozen.
    """
    projector, projector_inputs = _trained_projector(backbone), list[Tensor]()
    modules = vision_modules(backbone)
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    hook = projector and projector.register_forward_pre_hook(
        lambda _, inputs: projector_inputs.append(inputs[0])
    )
    try:
        output = vision_features(backbone, backbone.place(vision_inputs))
    finally:
        if hook:
            hook.remove()
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
    if projector is not None:
        return {"tower_features": projector_inputs[0].cpu()}
    prefix = VIDEO_PREFIX if "video_grid_thw" in vision_inputs else ""
    features = {f"{prefix}picture_features": torch.cat(list(output.pooler_output)).cpu()}
    if deepstack := getattr(output, "deepstack_features", None):
        layers = [torch.cat(list(layer)) for layer in deepstack]
        features[f"{prefix}deepstack_features"] = torch.stack(layers, dim=1).cpu()
    return features


def vision_features(backbone: Backbone, inputs: Inputs) -> Any:
    """Return the vision features of the images, or of the cached features, among `inputs`.

    Like the output of `get_image_features` of transformers the result has `pooler_output` and, for
    Qwen3-VL, `deepstack_features`. A video among `inputs` must come without images.
    """
    base: Any = backbone.model.base_model
    if "tower_features" in inputs:
        projected = projector_of(backbone)(inputs["tower_features"])
        return VisionOutput(pooler_output=[projected.flatten(0, -2)])
    if "picture_features" in inputs:
        deepstack = inputs.get("deepstack_features")
        layers = [[layer] for layer in deepstack.unbind(1)] if deepstack is not None else None
        return VisionOutput(pooler_output=[inputs["picture_features"]], deepstack_features=layers)
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


def _trained_projector(backbone: Backbone) -> nn.Module | None:
    """Return the projector if it is the only trained vision module; None if none is trained.

    Raises BlmError if anything else is trained.
    """
    trained = [part for part in vision_modules(backbone) if not is_frozen(part)]
    if not trained:
        return None
    projector = projector_of(backbone)
    if trained != [projector]:
        raise BlmError(
            f"the vision features of this {type(backbone.model).__name__} cannot be cached: its "
            f"{', '.join(type(part).__name__ for part in trained)} is trained. Freeze the vision tower"
            + ("" if projector is not None else " and the merger, which is a part of it")
        )
    return projector


def projector_of(backbone: Backbone) -> Any:
    """Return the projector, if it is a separate module; None otherwise."""
    parts = dict(backbone.model.base_model.named_children())
    return next((parts[name] for name in PROJECTORS if name in parts), None)


def _split_pictures(vision_inputs: VisionInputs) -> list[Inputs]:
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


def _collect(pictures: Sequence[PictureFeatures]) -> VisionInputs:
    names = dict.fromkeys(name for picture in pictures for name in picture)
    return {name: tuple(picture[name] for picture in pictures if name in picture) for name in names}
