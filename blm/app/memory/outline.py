"""The models of a recipe without the values of their weights, and typical inputs for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from blm.app.memory.tracking import TensorMemory, empty, strip_values
from blm.app.memory.work import choose_without_values
from blm.app.recipe import Recipe
from blm.backbone import Backbone, Inputs
from blm.backbone.precision import frozen_dtype
from blm.backbone.prompt import control_prompt
from blm.backbone.published_shapes import known_shapes, shape_of
from blm.backbone.stand_in import stand_in
from blm.policy.network import PolicyBatch, PolicyNetwork
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


@dataclass(frozen=True)
class _Kept:
    """Vision features that are in memory."""

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

    def frozen_backbone(self) -> Backbone:
        """Return the backbone as Stage II and acting hold it."""
        backbone = outline_backbone(self.recipe.stage1.backbone)
        strip_values(backbone.model, frozen_dtype(self.recipe.device, self.recipe.dtype))
        backbone.freeze()
        return backbone

    def network(self, hidden_size: int) -> PolicyNetwork:
        """Return bridge and policy."""
        with torch.device("meta"):
            network = PolicyNetwork(self.recipe.stage2.policy, hidden_size, len(self.recipe.robots))
        return strip_values(network)

    def prompts(self, backbone: Backbone, count: int) -> Inputs:
        """Return the inputs of control prompts with blank pictures."""
        images = dict.fromkeys(self.recipe.cameras, self._blank())
        prompt = control_prompt(INSTRUCTION, self.recipe.robots[0], images)
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

    def stage1(self) -> tuple[Backbone, ExampleBatch, int]:
        """Return the backbone of Stage I, a micro-batch, and the bytes of cached features of a
        picture (0 without a cache)."""
        config = self.recipe.stage1.training
        backbone = outline_backbone(self.recipe.stage1.backbone)
        choose_without_values(backbone, config)
        example = self._example(backbone, config)
        features = PictureFeatures()
        if config.cache_features:
            with TensorMemory():
                features = encode_pictures(backbone, self._one_picture(backbone, config))
            count = len(self.recipe.cameras)
            kept = {name: (value,) * count for name, value in features.items()}
            example = replace(example, processor_input=None, features=_Kept(kept))
        per_pass = config.loop.batch_size // (self.processes * config.loop.accumulate)
        sampler = MixtureSampler(
            [TokenizedSource(name="scenes", examples=[example])],
            examples_per_step=max(1, per_pass),
            pack_length=config.pack_length,
            seed=0,
        )
        sequences = sampler.sequences(0)
        batch = pack(backbone, [[example] * len(sequence) for sequence in sequences], ())
        return backbone, batch, sum(value.nbytes for value in features.values())

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


def _tokenized(backbone: Backbone, config: Stage1Config, messages: Messages) -> TokenizedExample:
    example = tokenize_conversation(backbone, messages, config.limits, None, Counter())
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
