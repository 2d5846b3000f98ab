"""The loss of Stage I: cross-entropy under the loss mask.

The language head runs on the masked tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blm.backbone import Backbone, Inputs
from blm.training.sft.pack import ExampleBatch, probe_examples
from blm.training.sft.prefix_attention import known_padding, uses_prefix_attention
from blm.training.sft.tokenize import concatenate_vision_inputs
from blm.training.sft.vision_features import (
    encode_pictures,
    forward_arguments,
    is_frozen,
    vision_features,
    vision_modules,
)


class MaskedLoss(NamedTuple):
    """Sums over the masked tokens of a batch; a tuple, because FSDP only searches tuples."""

    loss_sum: Tensor
    """Sum of cross-entropies [nats], float32."""
    tokens: Tensor
    """Number of tokens."""
    correct: Tensor
    """Number of tokens to which the model gives the highest probability."""


class MaskedLossModel(nn.Module):
    """Stage I as one module, for DDP and FSDP to wrap: an `ExampleBatch` in, a `MaskedLoss` out.

    All ranks must run the same modules; otherwise some would wait for others forever. So for a
    batch without images the vision tower runs on a dummy image whose output is multiplied by zero,
    if the tower is trained or `sharded` over ranks. A single process does the same, because AdamW
    treats a gradient of zero and no gradient differently. Frozen vision modules stay in evaluation
    mode.
    """

    def __init__(self, backbone: Backbone, *, sharded: bool = False, cached: bool = False) -> None:
        """Freeze parameters before this call. `cached` says that examples have vision features."""
        super().__init__()
        self.model, self.backbone = backbone.model, backbone
        self.sharded, self.vision_modules = sharded, vision_modules(backbone)
        if cached and self.vision_modules:
            self.dummy_picture = encode_pictures(backbone, self.dummy_picture)
        elif sharded and self.vision_modules:
            _ = self.dummy_picture  # before FSDP wraps the tower: the placeholder check runs it once

    @cached_property
    def dummy_picture(self) -> Inputs:
        """The vision inputs of one image."""
        return concatenate_vision_inputs([probe_examples(self.backbone)[1].vision_inputs(self.backbone)])

    @cached_property
    def dummy_picture_on_device(self) -> Inputs:
        """The same on the model's device, copied only once."""
        return self.backbone.place(self.dummy_picture)

    def train(self, mode: bool = True) -> MaskedLossModel:
        """Set the training mode, except of frozen vision modules."""
        super().train(mode)
        for module in self.vision_modules:
            if is_frozen(module):
                module.eval()
        return self

    def forward(self, batch: ExampleBatch) -> MaskedLoss:
        """Return the loss of the tokens of answers, each predicted from the tokens before it."""
        inputs = self.backbone.place(batch.inputs)
        device = inputs["input_ids"].device
        positions = batch.logit_positions.to(device, non_blocking=True)
        # shifted by one: the logits at a position predict the next token
        targets = inputs["input_ids"].roll(-1, dims=1).flatten().index_select(0, positions)
        zero = self._zero_of_unused_vision(inputs)
        arguments = forward_arguments(self.backbone, inputs)
        if batch.prefix_layout is not None and uses_prefix_attention(self.backbone):
            arguments["prefix_layout"] = batch.prefix_layout.to(device)
        with known_padding(batch.padding > 0), self._logits_only_at(positions), self._embeddings_plus(zero):
            logits = self.model(**arguments, use_cache=False).logits.float()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        correct = (logits.argmax(-1) == targets).sum()
        return MaskedLoss(loss + zero, torch.full_like(correct, len(targets)), correct)

    @contextmanager
    def _logits_only_at(self, positions: Tensor) -> Iterator[None]:
        """Run the language head only at these positions [K] of the flattened batch.

        The models' own argument `logits_to_keep` takes a mask, and counting its elements makes the
        host wait for the device.
        """
        hook = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, inputs: (inputs[0].flatten(0, 1).index_select(0, positions),)
        )
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _embeddings_plus(self, zero: Tensor | float) -> Iterator[None]:
        """If sharded, add a zero that depends on the vision tower to the token embeddings.

        If only the projector and adapters are trained, embeddings of text alone have no gradient,
        and FSDP would add up the gradients of the first block later than in processes with images.
        """
        if not (self.sharded and isinstance(zero, Tensor)):
            yield
            return
        hook = self.model.get_input_embeddings().register_forward_hook(
            lambda _, inputs, output: output + zero.to(output.dtype)
        )
        try:
            yield
        finally:
            hook.remove()

    def _zero_of_unused_vision(self, inputs: Inputs) -> Tensor | float:
        """Return zero; without images in the batch, the dummy image's output times zero."""
        needed = self.vision_modules and (self.sharded or not all(map(is_frozen, self.vision_modules)))
        if not needed or "video_grid_thw" in inputs or not inputs.keys().isdisjoint(self.dummy_picture):
            return 0.0
        output = vision_features(self.backbone, self.dummy_picture_on_device)
        deepstack = getattr(output, "deepstack_features", None) or []
        groups = (output.pooler_output, *deepstack)
        return sum((features.float() * 0).sum() for group in groups for features in group)
