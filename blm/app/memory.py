"""What a recipe needs in memory and on disk, from models built without memory (torch's meta device)."""

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
TRAINED, EMA = 16, 4
"""Bytes a trained parameter: float32 weight, gradient and two moments of AdamW; its moving average."""
INSTRUCTION = "Pick up the red cube and move it to the green goal."
STEPS = 65
"""Of a demonstration, on average."""
TEXT_TOKENS = 60
"""Of a control prompt, beside its pictures, with the tokenizers of Qwen."""


@dataclass(frozen=True)
class Plan:
    """Sizes in parameters, tokens and bytes. What a step of training needs for activations is not in them."""

    backbone: int
    """Parameters."""
    tapped: int
    """Parameters of what runs for an action: eye, embeddings, blocks 1..k."""
    policy: int
    """Parameters of bridge, transformer and heads."""
    tokens: int
    """Of a control prompt."""
    hidden: int
    """Size of a hidden state."""

    @property
    def acting(self) -> int:
        """Bytes: the tapped part in bfloat16, the policy in float32."""
        return 2 * self.tapped + 4 * self.policy

    @property
    def stage2(self) -> int:
        """Bytes of Stage II from a cache of intents: the backbone is not in memory."""
        return (TRAINED + EMA) * self.policy

    @property
    def frame(self) -> int:
        """Bytes of one frame in the cache, float16."""
        return 2 * self.tokens * self.hidden


def plan(recipe: Recipe) -> Plan:
    """Return the sizes of a recipe. Raises UnknownNameError for a backbone that is neither made nor known."""
    name = recipe.stage1.backbone
    source = BACKBONES.get(name, name)
    if callable(source) or Path(source).is_dir():
        backbone = Backbone.load(name)
        model, hidden = backbone.model, backbone.hidden_size
        blank = np.zeros((recipe.image_size, recipe.image_size, 3), np.uint8)
        prompt = control_prompt(
            INSTRUCTION,
            "panda",
            dict.fromkeys(recipe.cameras, blank),
        )
        tokens = int(backbone.encode([prompt])["input_ids"].shape[1])
        blocks = backbone.decoder.layers
    else:
        config = shape_of(name)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        hidden, vision = config.text_config.hidden_size, config.vision_config
        side = recipe.image_size // (vision.patch_size * vision.spatial_merge_size)
        tokens = len(recipe.cameras) * (side**2 + 2) + TEXT_TOKENS
        blocks = model.model.language_model.layers
    with torch.device("meta"):
        policy = PolicyNetwork(recipe.stage2.policy, hidden, len(recipe.robots))
    unused = sum(map(count, blocks[recipe.stage2.layer :]))
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    return Plan(
        backbone=count(model),
        tapped=count(model) - unused - (0 if tied else count(head)),
        policy=count(policy),
        tokens=tokens,
        hidden=hidden,
    )


def count(module: nn.Module) -> int:
    """Return the number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def describe(recipe: Recipe) -> str:
    """Return lines for people."""
    made = plan(recipe)
    frames = (
        recipe.demonstrations.episodes * len(recipe.robots) * len(recipe.tasks) * 65 // recipe.stage2.stride
    )
    rows = {
        "backbone": f"{made.backbone / 1e6:,.1f} M parameters, {2 * made.backbone / GIB:.2f} GiB in bfloat16",
        "of it for an action": f"{made.tapped / 1e6:,.1f} M (eye and blocks 1..{recipe.stage2.layer})",
        "policy": f"{made.policy / 1e6:,.1f} M parameters",
        "acting": f"{made.acting / GIB:.2f} GiB",
        "Stage II from the cache": f"{made.stage2 / GIB:.2f} GiB, and activations",
        "cache": f"{made.tokens} tokens x {made.hidden}: {made.frame / 1e6:.2f} MB a frame, about "
        f"{frames * made.frame / 1e9:,.1f} GB for {frames:,} frames (half in int8)",
    }
    return "\n".join(f"{name:>24}  {value}" for name, value in rows.items())
