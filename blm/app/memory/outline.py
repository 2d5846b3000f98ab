"""The models of a recipe without the values of their weights, and typical inputs for them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blm.app.memory.tracking import TensorMemory, empty, strip_values
from blm.app.memory.work import choose_without_values
from blm.app.recipe import Recipe
from blm.app.stage1 import NANO
from blm.backbone import Backbone, Inputs
from blm.backbone.pooling import picture_grids, pooled_count
from blm.backbone.precision import frozen_dtype
from blm.backbone.prompt import control_prompt, question_prompt
from blm.backbone.published_shapes import known_shapes, shape_of
from blm.backbone.stand_in import stand_in
from blm.policy.network import PolicyBatch, PolicyNetwork
from blm.policy.unet import make_network
from blm.training.loop.loop import LoopConfig
from blm.training.sft.mixture_sampler import MixtureSampler, TokenizedSource
from blm.training.sft.pack import ExampleBatch, pack
from blm.training.sft.tokenize import (
    Messages,
    TokenizedExample,
    VisionInputs,
    concatenate_vision_inputs,
    tokenize_conversation,
)
from blm.training.sft.train import Stage1Config
from blm.training.sft.vision_features import PictureFeatures, encode_pictures
from blm.types import BlmError, Message

INSTRUCTION = "Pick up the red cube and move it to the green goal."
"""A typical instruction."""
QUESTION = "Point to the red cube and to the green goal in the base view."
ANSWER = "The cube is left of the gripper and in front of it. cube (412, 530) goal (633, 287)"
"""A typical turn about a scene."""
FRAMES = 8
"""Pictures of a long conversation: the frames of those of ShareRobot."""


@dataclass(frozen=True)
class _Kept:
    """Vision inputs or features that are in memory."""

    features: VisionInputs

    def read(self) -> VisionInputs:
        return self.features


def outline_backbone(name: str) -> Backbone:
    """Return a backbone without the values of its weights, in float32.

    A backbone of known shape needs no download. Raises as `Backbone.outline` does.
    """
    if name in known_shapes() and not Path(name).is_dir():
        texts = (INSTRUCTION, QUESTION, ANSWER, _control_text("panda", ("base", "side", "wrist")))
        backbone = stand_in(shape_of(name), device="meta", texts=texts)
    else:
        backbone = Backbone.outline(name)
    strip_values(backbone.model)
    return backbone


def _control_text(robot: str, cameras: Sequence[str]) -> str:
    blank = np.zeros((2, 2, 3), np.uint8)
    return control_prompt(INSTRUCTION, robot, dict.fromkeys(cameras, blank))[0].text


@dataclass(frozen=True)
class Outline:
    """A recipe whose models have no values."""

    recipe: Recipe
    processes: int
    """Number of processes that train together."""

    @property
    def on_cuda(self) -> bool:
        return torch.device(self.recipe.device).type == "cuda"

    def mixed(self, loop: LoopConfig) -> bool:
        """Return whether the loss of a training runs under bfloat16 autocast."""
        return frozen_dtype(self.recipe.device, loop.precision) is torch.bfloat16

    def frozen_backbone(self, blocks: int | None = None) -> Backbone:
        """Return the backbone as Stage II and acting hold it: whole, or its first blocks without
        the head, as `Backbone.load` loads them."""
        backbone = outline_backbone(self.recipe.stage1.backbone)
        strip_values(backbone.model, frozen_dtype(self.recipe.device, self.recipe.dtype))
        if blocks is not None:
            backbone.require_layer(blocks)
            decoder: Any = backbone.decoder
            decoder.layers = decoder.layers[:blocks]
            backbone.model.set_output_embeddings(nn.Identity())
        backbone.freeze()
        return backbone

    def pooled_tokens(self, backbone: Backbone) -> int:
        """Return the tokens of a control prompt after pooling."""
        inputs, pool = self.prompts(backbone, 1), self.recipe.stage2.pool
        tokens = int(inputs["input_ids"].shape[1])
        if pool == 1:
            return tokens
        return tokens - sum(h * w - pooled_count(h, w, pool) for h, w in picture_grids(backbone, inputs))

    def network(self, hidden_size: int) -> PolicyNetwork:
        """Return bridge and policy."""
        with torch.device("meta"):
            network = make_network(self.recipe.stage2.policy, hidden_size, len(self.recipe.robots))
        return strip_values(network)

    def prompts(self, backbone: Backbone, count: int) -> Inputs:
        """Return the inputs of control prompts with blank pictures."""
        images = dict.fromkeys(self.recipe.cameras, self._blank())
        prompt = control_prompt(INSTRUCTION, self.recipe.robots[0], images, order=self.recipe.prompt)
        return backbone.read([prompt] * count, side="right")

    def policy_batch(self, tokens: int, hidden_size: int) -> PolicyBatch:
        """Return a batch of Stage II of one process, with hidden states as the cache stores them."""
        policy, loop = self.recipe.stage2.policy, self.recipe.stage2.loop
        size = max(1, loop.batch_size // (self.processes * loop.accumulate))
        seen = torch.ones(size, tokens, dtype=torch.bool)
        chunk = (size, policy.horizon, policy.max_dim)
        hidden = [empty(size, tokens, hidden_size, dtype=torch.float16) for _ in range(2)]
        return PolicyBatch(
            hidden=hidden[0],
            mask=seen,
            future_hidden=hidden[1],
            future_mask=seen.clone(),
            state=torch.zeros(size, policy.max_dim),
            actions=torch.zeros(chunk),
            real=torch.ones(chunk, dtype=torch.bool),
            embodiment=torch.zeros(size, dtype=torch.long),
            noise=torch.zeros(chunk),
            tau=torch.zeros(size),
            ids=range(size),
        )

    def stage1_backbone(self) -> Backbone:
        """Return the backbone as Stage I holds it: see `load_pretrained`."""
        settings = self.recipe.stage1
        backbone = outline_backbone(settings.backbone)
        if settings.backbone != NANO:
            frozen = frozen_dtype(self.recipe.device, self.recipe.dtype)
            strip_values(backbone.model, frozen, settings.training.trains)
        choose_without_values(backbone, settings.training)
        return backbone

    def scene_example(self, backbone: Backbone) -> tuple[TokenizedExample, int]:
        """Return a conversation about a scene, and the bytes of cached features of a picture (0
        without a cache)."""
        config = self.recipe.stage1.training
        example = self._example(backbone, config)
        features = PictureFeatures()
        if config.cache_features:
            with TensorMemory():
                features = encode_pictures(backbone, self._one_picture(backbone, config))
            count = len(self.recipe.cameras)
            kept = {name: (value,) * count for name, value in features.items()}
            example = replace(example, processor_input=None, features=_Kept(kept))
        return example, sum(value.nbytes for value in features.values())

    @property
    def examples_per_pass(self) -> int:
        """Number of conversations in a micro-batch of Stage I of one process."""
        loop = self.recipe.stage1.training.loop
        return max(1, loop.batch_size // (self.processes * loop.accumulate))

    def stage1_batch(self, backbone: Backbone, example: TokenizedExample, count: int) -> ExampleBatch:
        """Return a micro-batch of equal conversations, packed as the recipe says."""
        one = _without_pixels(backbone, example)
        sampler = MixtureSampler(
            [TokenizedSource(name="equal", examples=[one])],
            examples_per_step=count,
            pack_length=self.recipe.stage1.training.pack_length,
            seed=0,
        )
        return pack(backbone, [[one] * len(sequence) for sequence in sampler.sequences(0)], ())

    def longest(self, backbone: Backbone) -> TokenizedExample:
        """Return a conversation of `limits.max_length` tokens: about as many of the largest pictures
        as fit, up to `FRAMES`, and text."""
        config = self.recipe.stage1.training
        side = math.isqrt(config.limits.max_pixels or self.recipe.image_size**2)
        picture = np.zeros((side, side, 3), np.uint8)

        def talk(pictures: int, words: int) -> TokenizedExample | None:
            messages = (
                *question_prompt(QUESTION, [picture] * pictures),
                Message("assistant", ("a " * words,)),
            )
            return tokenize_conversation(backbone, messages, config.limits, None, Counter())

        pictures = next(count for count in range(FRAMES, -1, -1) if talk(count, 1) is not None)
        one, more = talk(pictures, 1), talk(pictures, 17)
        if one is None or more is None:
            return self._example(backbone, config)
        words = 1 + (config.limits.max_length - len(one)) * 16 // (len(more) - len(one))
        found = talk(pictures, words)
        assert found is not None
        return found

    def _blank(self) -> np.ndarray:
        side = self.recipe.image_size
        return np.zeros((side, side, 3), np.uint8)

    def _example(self, backbone: Backbone, config: Stage1Config) -> TokenizedExample:
        """Return a typical conversation about a scene in all cameras."""
        pictures = dict.fromkeys(self.recipe.cameras, self._blank())
        first = control_prompt(INSTRUCTION, self.recipe.robots[0], pictures)
        answer = Message("assistant", (ANSWER,))
        more = [Message("user", (QUESTION,)), answer] * (self.recipe.corpus.turns - 1)
        return _tokenized(backbone, config, (*first, answer, *more))

    def _one_picture(self, backbone: Backbone, config: Stage1Config) -> Inputs:
        prompt = control_prompt(INSTRUCTION, self.recipe.robots[0], {"base": self._blank()})
        example = _tokenized(backbone, config, (*prompt, Message("assistant", (ANSWER,))))
        return concatenate_vision_inputs([example.vision_inputs(backbone)])


def _without_pixels(backbone: Backbone, example: TokenizedExample) -> TokenizedExample:
    """Return an example whose pictures were processed once and have no values."""
    if example.processor_input is None:
        return example
    inputs = {
        name: tuple(empty(*one.shape) if one.is_floating_point() else one for one in parts)
        for name, parts in example.vision_inputs(backbone).items()
    }
    return replace(example, processor_input=None, features=_Kept(inputs))


def _tokenized(backbone: Backbone, config: Stage1Config, messages: Messages) -> TokenizedExample:
    example = tokenize_conversation(backbone, messages, config.limits, None, Counter(), independent=True)
    if example is None:
        raise BlmError(
            f"a question about all cameras is longer than limits.max_length = {config.limits.max_length}: "
            "no scene question could be trained on"
        )
    return example


def count_parameters(*modules: nn.Module) -> int:
    """Return the number of parameters; shared ones count once."""
    unique = dict[Tensor, int]()
    for module in modules:
        unique |= {parameter: parameter.numel() for parameter in module.parameters()}
    return sum(unique.values())
