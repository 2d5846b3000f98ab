"""Frozen vision features, computed once per distinct picture and fed in place of pixels.

What is kept depends on what is trained. If the whole eye is frozen, its output: any model. If only the
projector behind the tower is trained, what enters the projector: LLaVA- and SmolVLM-type models.
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
from blm.training.sft.tokenize import Media, Row, join, ready
from blm.types import BlmError

PROJECTORS = ("multi_modal_projector", "connector")
"""Names of projectors that are modules of their own, behind the tower."""
AT_ONCE = 64
"""Pictures that a tower sees in one pass."""
Features = dict[str, Tensor]
"""Of one picture or several: "tower_features" [units, tokens, width], or "picture_features" [tokens, width]
with, for Qwen3-VL, "deepstack_features" [tokens, blocks, width]. Of a video both begin with "video_"."""
VIDEO = "video_"
GRIDS = {"image_grid_thw": "pixel_values", "video_grid_thw": "pixel_values_videos"}
"""Sizes of pictures and videos -> their patches, which stand in one row."""


@dataclass
class Seen(BaseModelOutputWithPooling):
    """Cached features in the form in which the models of transformers take what their own eye made."""

    pooler_output: Any = None
    """Tensors [tokens, width], one or several pictures each."""
    deepstack_features: Any = None
    """Of Qwen3-VL, alike for each of its blocks."""


def eye_of(backbone: Backbone) -> list[nn.Module]:
    """Return the modules that see: those beside the decoder. An empty list for a model of text only."""
    parts = backbone.model.base_model.children()
    return [part for part in parts if not any(module is backbone.decoder for module in part.modules())]


def is_frozen(part: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in part.parameters())


class FeatureCache:
    """Puts features in place of the pixels of rows, as many at a time as the caller likes."""

    def __init__(self, backbone: Backbone, counts: Counter[str]) -> None:
        """`counts` gets 'pictures' and 'distinct pictures'. Raises BlmError unless the tower is frozen."""
        projector = _trained_projector(backbone)
        self.backbone, self.counts, self.together = backbone, counts, AT_ONCE if projector is not None else 1
        self.features: dict[str, Features] = {}

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        keys, unseen = [], dict[str, Inputs]()
        for row in rows:
            units = [(content_key(unit), unit) for unit in _units(row.media(self.backbone))]
            keys.append([key for key, _ in units])
            self.counts["pictures"] += len(units)
            unseen |= {key: unit for key, unit in units if key not in self.features}
            if len(unseen) >= self.together or row is rows[-1]:
                self.features |= _see_all(self.backbone, unseen, self.together)
                self.counts["distinct pictures"] += len(unseen)
                unseen = {}
        return [
            replace(row, shown=None, features=_gather([self.features[key] for key in group]))
            for row, group in zip(rows, keys, strict=True)
        ]


def _see_all(backbone: Backbone, units: Mapping[str, Inputs], together: int) -> dict[str, Features]:
    """Return the features of units; those of one shape are seen in one pass if several may be."""
    made: dict[str, Features] = {}
    shapes = defaultdict[object, list[str]](list)
    for place, (key, unit) in enumerate(units.items()):
        alike = tuple((name, value.shape) for name, value in unit.items())
        shapes[alike if together > 1 and not GRIDS.keys() & unit.keys() else place].append(key)
    for keys in shapes.values():
        joined = {name: torch.cat([units[key][name] for key in keys]) for name in units[keys[0]]}
        features = encode(backbone, joined)
        pieces = {n: v.split(1) if len(keys) > 1 else (v,) for n, v in features.items()}
        for place, key in enumerate(keys):
            # a copy: another process gets whole storages, of which a piece would be one picture in many
            made[key] = {name: parts[place].clone() for name, parts in pieces.items()}
    return made


@torch.no_grad()
def encode(backbone: Backbone, media: Inputs) -> Features:
    """Return the features of a picture, or of pictures for a projector, on the CPU.

    Raises BlmError unless the tower is frozen.
    """
    projector, entered = _trained_projector(backbone), list[Tensor]()
    eye = eye_of(backbone)
    modes = [part.training for part in eye]
    for part in eye:
        part.eval()
    hook = projector and projector.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    try:
        seen = see(backbone, ready(backbone, media))
    finally:
        if hook:
            hook.remove()
        for part, mode in zip(eye, modes, strict=True):
            part.train(mode)
    if projector is not None:
        return {"tower_features": entered[0].cpu()}
    kind = VIDEO if "video_grid_thw" in media else ""
    features = {f"{kind}picture_features": torch.cat(list(seen.pooler_output)).cpu()}
    if deep := getattr(seen, "deepstack_features", None):
        layers = [torch.cat(list(layer)) for layer in deep]
        features[f"{kind}deepstack_features"] = torch.stack(layers, dim=1).cpu()
    return features


def see(backbone: Backbone, inputs: Inputs) -> Any:
    """Return what the model's eye makes of the pictures, or cached features, among `inputs`.

    A video among `inputs` must come without pictures. The result has `pooler_output` and, for Qwen3-VL,
    `deepstack_features`, as transformers' own output has.
    """
    base: Any = backbone.model.base_model
    if "tower_features" in inputs:
        projected = projector_of(backbone)(inputs["tower_features"])
        return Seen(pooler_output=[projected.flatten(0, -2)])
    if "picture_features" in inputs:
        deep = inputs.get("deepstack_features")
        layers = [[layer] for layer in deep.unbind(1)] if deep is not None else None
        return Seen(pooler_output=[inputs["picture_features"]], deepstack_features=layers)
    words = ("input_ids", "attention_mask", "position_ids")
    pictures = {name: value for name, value in inputs.items() if name not in words}
    if "video_grid_thw" in pictures:
        return base.get_video_features(**pictures, return_dict=True)
    return base.get_image_features(**pictures, return_dict=True)


def merged(backbone: Backbone, inputs: Inputs) -> dict[str, Any]:
    """Return the arguments of the model's forward: cached features become what its eye would give."""
    if not any(name.endswith("_features") for name in inputs):
        return dict(inputs)
    words = {name: value for name, value in inputs.items() if not name.endswith("_features")}
    pictures = {name: value for name, value in inputs.items() if name not in words}
    videos = {
        name.removeprefix(VIDEO): pictures.pop(name) for name in list(pictures) if name.startswith(VIDEO)
    }
    kinds = {"image": pictures, "video": videos}
    return {
        **words,
        "mm_encoder_outputs": {kind: see(backbone, part) for kind, part in kinds.items() if part},
    }


def _trained_projector(backbone: Backbone) -> nn.Module | None:
    """Return the projector if it alone of the eye is trained; None if nothing is. Raises BlmError else."""
    trained = [part for part in eye_of(backbone) if not is_frozen(part)]
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
    """Return the projector, if it is a module of its own; None if not."""
    parts = dict(backbone.model.base_model.named_children())
    return next((parts[name] for name in PROJECTORS if name in parts), None)


def _units(media: Media) -> list[Inputs]:
    """Split media into single pictures (SmolVLM: tiles) and, after them, single videos."""
    if not media:
        return []
    whole = join([media])
    if GRIDS.keys() & whole.keys():
        units = list[Inputs]()
        for name, pixels in GRIDS.items():
            grids = whole.get(name, torch.zeros(0, 3, dtype=torch.long))
            patches = whole[pixels].split(grids.prod(-1).tolist()) if len(grids) else ()
            units += [{pixels: p, name: g[None]} for p, g in zip(patches, grids, strict=True)]
        return units
    pieces = {name: value.split(1) for name, value in whole.items()}
    return [dict(zip(pieces, unit, strict=True)) for unit in zip(*pieces.values(), strict=True)]


def _gather(pictures: Sequence[Features]) -> Media:
    names = dict.fromkeys(name for picture in pictures for name in picture)
    return {name: tuple(picture[name] for picture in pictures if name in picture) for name in names}
