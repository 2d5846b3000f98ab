"""Estimate the memory and disk space of a recipe, from models on torch's meta device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from blm.app.recipe import Recipe
from blm.backbone import BACKBONES, Backbone
from blm.backbone.prompt import control_prompt
from blm.backbone.published_shapes import shape_of
from blm.policy.network import PolicyNetwork

GIB = 2**30
TRAINING_BYTES = 16
"""Bytes per trained parameter: float32 weight, gradient and the two moments of AdamW."""
EMA_BYTES = 4
"""Bytes per parameter of the exponential moving average, float32."""
INSTRUCTION = "Pick up the red cube and move it to the green goal."
"""A typical instruction, whose control prompt is measured."""
STEPS_PER_DEMONSTRATION = 65
"""Average length of a demonstration [control steps]."""
TEXT_TOKENS = 60
"""Tokens of a control prompt without its images, with the tokenizers of Qwen."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Sizes in parameters, tokens and bytes. Activations during training are not included."""

    backbone: int
    """Parameters of the whole backbone."""
    tapped: int
    """Parameters that are used for an action: vision tower, embeddings, blocks 1..k."""
    policy: int
    """Parameters of bridge, diffusion transformer and heads."""
    tokens: int
    """Tokens of a control prompt."""
    hidden: int
    """Size of a hidden state."""

    @property
    def inference_bytes(self) -> int:
        """Bytes for choosing actions: the tapped part in bfloat16, the policy in float32."""
        return 2 * self.tapped + 4 * self.policy

    @property
    def stage2_bytes(self) -> int:
        """Bytes of Stage II with a hidden-state cache: the backbone is not in memory."""
        return (TRAINING_BYTES + EMA_BYTES) * self.policy

    @property
    def cached_frame_bytes(self) -> int:
        """Bytes per frame of the hidden-state cache, in float16."""
        return 2 * self.tokens * self.hidden


def estimate_memory(recipe: Recipe) -> MemoryEstimate:
    """Return the sizes of a recipe. Raises UnknownNameError for an unknown backbone."""
    name = recipe.stage1.backbone
    source = BACKBONES.get(name, name)
    if callable(source) or Path(source).is_dir():
        backbone = Backbone.load(name)
        model = backbone.model
        hidden = backbone.hidden_size
        blank = np.zeros((recipe.image_size, recipe.image_size, 3), np.uint8)
        prompt = control_prompt(INSTRUCTION, "panda", dict.fromkeys(recipe.cameras, blank))
        tokens = int(backbone.encode([prompt])["input_ids"].shape[1])
        blocks = backbone.decoder.layers
    else:
        config = shape_of(name)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        hidden = config.text_config.hidden_size
        vision = config.vision_config
        patches_per_side = recipe.image_size // (vision.patch_size * vision.spatial_merge_size)
        tokens = len(recipe.cameras) * (patches_per_side**2 + 2) + TEXT_TOKENS
        blocks = model.model.language_model.layers
    with torch.device("meta"):
        policy = PolicyNetwork(recipe.stage2.policy, hidden, len(recipe.robots))
    unused = sum(map(count_parameters, blocks[recipe.stage2.layer :]))
    head = model.get_output_embeddings()
    if head.weight is not model.get_input_embeddings().weight:
        unused += count_parameters(head)
    return MemoryEstimate(
        backbone=count_parameters(model),
        tapped=count_parameters(model) - unused,
        policy=count_parameters(policy),
        tokens=tokens,
        hidden=hidden,
    )


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def describe(recipe: Recipe) -> str:
    """Return the estimate as lines of text."""
    estimate = estimate_memory(recipe)
    episodes = recipe.demonstrations.episodes * len(recipe.robots) * len(recipe.tasks)
    frames = episodes * STEPS_PER_DEMONSTRATION // recipe.stage2.stride
    cache_bytes = frames * estimate.cached_frame_bytes
    rows = {
        "backbone": f"{estimate.backbone / 1e6:,.1f} M parameters, "
        f"{2 * estimate.backbone / GIB:.2f} GiB in bfloat16",
        "used for an action": f"{estimate.tapped / 1e6:,.1f} M "
        f"(vision tower and blocks 1..{recipe.stage2.layer})",
        "policy": f"{estimate.policy / 1e6:,.1f} M parameters",
        "inference": f"{estimate.inference_bytes / GIB:.2f} GiB",
        "Stage II with cache": f"{estimate.stage2_bytes / GIB:.2f} GiB, plus activations",
        "hidden-state cache": f"{estimate.tokens} tokens x {estimate.hidden}: "
        f"{estimate.cached_frame_bytes / 1e6:.2f} MB per frame, about {cache_bytes / 1e9:,.1f} GB for "
        f"{frames:,} frames (half in int8)",
    }
    return "\n".join(f"{name:>24}  {value}" for name, value in rows.items())
