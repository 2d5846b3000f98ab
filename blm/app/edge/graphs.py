"""The parts of a policy as modules of tensors only, in the form that becomes an ONNX graph.

Shapes: B observations, N pictures, S side, T features of a picture, L tokens, d hidden size, H
action steps, D padded dimension.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blm.backbone.backbone import Backbone
from blm.backbone.truncation import truncated
from blm.policy.network import PolicyNetwork
from blm.types import BlmError

FAMILIES = ("llava",)
"""`model_type` of the backbones that can be exported: nano and smol are of this family."""


class Eye(nn.Module):
    """Pictures uint8 [N, S, S, 3] -> features [N, T, d] at the width of the language model."""

    scale: Tensor
    shift: Tensor

    def __init__(self, view: Any, processor: Any) -> None:
        super().__init__()
        self.tower, self.projector = view.vision_tower, view.multi_modal_projector
        self.layer = view.config.vision_feature_layer
        scale, shift = _affine(processor)
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", shift[:, None, None])

    def forward(self, pictures: Tensor) -> Tensor:
        pixels = pictures.permute(0, 3, 1, 2).float() * self.scale + self.shift
        states = self.tower(pixels).hidden_states[self.layer]
        features: Tensor = self.projector(states)
        return features


class Reader(nn.Module):
    """Tokens [B, L], mask [B, L] and features of all pictures [N, T, d] -> H_k [B, L, d]."""

    def __init__(self, view: Any, feature_token: int) -> None:
        super().__init__()
        self.language_model, self.feature_token = view.language_model, feature_token

    def forward(self, ids: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        embedded = self.language_model.embed_tokens(ids)
        is_feature = ids == self.feature_token
        place = (is_feature.flatten().cumsum(0) - 1).clamp_min(0).view_as(ids)
        embedded = torch.where(is_feature[..., None], features.flatten(0, 1)[place], embedded)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        hidden: Tensor = self.language_model(
            inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return hidden


class Actor(nn.Module):
    """The bridge and all denoising steps: H_k -> normalised actions [B, H, D].

    The flow times of the steps, and all that depends on them alone, are constants of the graph.
    """

    def __init__(self, network: PolicyNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, hidden: Tensor, mask: Tensor, state: Tensor, robot: Tensor, noise: Tensor, dims: Tensor
    ) -> Tensor:
        return self.network.sample(hidden, mask.bool(), state, robot, noise, dims)


def eye_and_reader(backbone: Backbone, layer: int) -> tuple[Eye, Reader]:
    """Return the graphs of the tapped part of a backbone. Raises BlmError for another family."""
    kind = backbone.model.config.model_type
    config: Any = backbone.model.config
    if kind not in FAMILIES or config.vision_feature_select_strategy != "full":
        raise BlmError(
            f"a policy on a {kind} cannot be exported; the families that can are {', '.join(FAMILIES)} "
            "(blm-nano, smol). `blm serve` serves every checkpoint"
        )
    view: Any = truncated(backbone.model, backbone._path, layer)
    return Eye(view, backbone.processor).eval(), Reader(view, backbone.placeholder_id).eval()


def _affine(processor: Any) -> tuple[Tensor, Tensor]:
    """Return scale and shift [3] that turn levels 0 .. 255 into what the processor returns."""
    images = processor.image_processor
    mean, std = (np.asarray(x, np.float64) for x in (images.image_mean, images.image_std))
    factor = images.rescale_factor if images.do_rescale else 1.0
    if not images.do_normalize:
        mean, std = np.zeros(3), np.ones(3)
    return torch.tensor(factor / std).float(), torch.tensor(-mean / std).float()
