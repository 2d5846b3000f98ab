"""The loss of Stage I: cross-entropy under the loss mask.

The language head runs on the masked tokens only, a chunk of them at a time: of a large vocabulary,
the logits of a whole batch would take more memory than the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from blm.backbone import Backbone, Inputs
from blm.backbone.precision import mixed_precision
from blm.backbone.truncation import shallow_copy
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

LOGITS_AT_ONCE = 2**28
"""Maximum number of logits that exist at once: 1 GiB in float32."""


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
        with mixed_precision(self.model):
            return self._loss(batch)

    def _loss(self, batch: ExampleBatch) -> MaskedLoss:
        inputs = self.backbone.place(batch.inputs)
        device = inputs["input_ids"].device
        positions = batch.logit_positions.to(device, non_blocking=True)
        # shifted by one: the logits at a position predict the next token
        targets = inputs["input_ids"].roll(-1, dims=1).flatten().index_select(0, positions)
        zero = self._zero_of_unused_vision(inputs)
        arguments = forward_arguments(self.backbone, inputs)
        if batch.prefix_layout is not None and uses_prefix_attention(self.backbone):
            arguments["prefix_layout"] = batch.prefix_layout.to(device)
        with known_padding(batch.padding > 0), self._embeddings_plus(zero):
            output = self.model.base_model(**arguments, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, positions)
        loss, correct = self._sums(output, hidden, targets)
        return MaskedLoss(loss + zero, torch.full_like(correct, len(targets)), correct)

    def _sums(self, output: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of cross-entropies, and the number of correct tokens.

        `hidden` [K, d] are the hidden states before the head, `targets` [K] the next tokens. The
        tokens are split into equal chunks of at most LOGITS_AT_ONCE logits; the backward pass
        computes the logits of each chunk again. A single chunk is not recomputed.
        """
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        count = max(1, -(-len(targets) * vocabulary // LOGITS_AT_ONCE))
        size = max(1, -(-len(targets) // count))
        head = _HeadLoss(self.model, output)
        if size >= len(targets):
            return head(hidden, targets)
        parts = [
            checkpoint(head, *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(hidden.split(size), targets.split(size), strict=True)
        ]
        losses, correct = zip(*parts, strict=True)
        return torch.stack(losses).sum(), torch.stack(correct).sum()

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


class _HeadLoss:
    """Cross-entropy from hidden states; the logits are those of the model's own forward.

    Some models change the logits behind the head (Gemma and PaliGemma limit them by
    `final_logit_softcapping`). So the whole forward runs, on a copy of the model whose base returns
    the given hidden states.
    """

    def __init__(self, model: Any, output: Any) -> None:
        self.given = _Given(output)
        self.model = shallow_copy(model)
        self.model._modules[model.base_model_prefix] = self.given

    def __call__(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum over tokens [K], whose hidden states are [K, d], and the number of correct
        tokens."""
        self.given.hidden = hidden[None]
        logits = self.model(use_cache=False).logits[0].float()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        return loss, (logits.detach().argmax(-1) == targets).sum()


class _Given(nn.Module):
    """Returns the output of a base model with other hidden states."""

    hidden: Tensor

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, **_: Any) -> Any:
        return type(self.output)(**{**self.output, "last_hidden_state": self.hidden})
