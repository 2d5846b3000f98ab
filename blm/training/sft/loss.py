"""The loss of Stage I: cross-entropy of the assistant's tokens; the language head runs on them only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blm.backbone import Backbone, Inputs
from blm.training.sft.pack import ExampleBatch, probe_rows
from blm.training.sft.prefix_attention import is_turned, known_padding
from blm.training.sft.tokenize import join, ready
from blm.training.sft.vision_features import encode, eye_of, is_frozen, merged, see


class Answers(NamedTuple):
    """Sums over the learnt tokens of a batch. A tuple, because FSDP looks for tensors in tuples only."""

    loss_sum: Tensor
    """Of their cross-entropies [nats], float32."""
    tokens: Tensor
    """How many they are."""
    correct: Tensor
    """How many of them are the model's first choice."""


class MaskedLossModel(nn.Module):
    """Stage I as one module, for DDP and FSDP to wrap: a batch in, sums over its answers out.

    All ranks must run the same modules, or some wait for others for ever. So a batch without pictures runs
    the eye on a dummy picture and counts it zero times, if the eye is trained, or `sharded` over ranks. One
    process does the same, because a zero gradient and none are not the same to AdamW. A frozen eye stays in
    evaluation mode.
    """

    def __init__(self, backbone: Backbone, *, sharded: bool = False, cached: bool = False) -> None:
        """`cached`: batches are of rows from `cache_features`. Freeze first what shall be frozen."""
        super().__init__()
        self.model, self.backbone = backbone.model, backbone
        self.sharded, self.eye = sharded, eye_of(backbone)
        if cached and self.eye:
            self.dummy = encode(backbone, self.dummy)

    @cached_property
    def dummy(self) -> Inputs:
        """What the eye reads for one picture."""
        return join([probe_rows(self.backbone)[1].media(self.backbone)])

    @cached_property
    def dummy_on_device(self) -> Inputs:
        """The same, ready for the model."""
        return ready(self.backbone, self.dummy)

    def train(self, mode: bool = True) -> MaskedLossModel:
        super().train(mode)
        for part in self.eye:
            if is_frozen(part):
                part.eval()
        return self

    def forward(self, batch: ExampleBatch) -> Answers:
        inputs = ready(self.backbone, batch.inputs)
        device = inputs["input_ids"].device
        chosen = batch.before_answers.to(device, non_blocking=True)
        targets = inputs["input_ids"].roll(-1, dims=1).flatten().index_select(0, chosen)
        nothing = self._nothing(inputs)
        read = merged(self.backbone, inputs)
        if batch.turns is not None and is_turned(self.backbone):
            read["turns"] = batch.turns.to(device)
        with known_padding(batch.padding > 0), self._head_on(chosen):
            logits = self.model(**read, use_cache=False).logits.float()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        right = (logits.argmax(-1) == targets).sum()
        return Answers(loss + nothing, torch.full_like(right, len(targets)), right)

    @contextmanager
    def _head_on(self, chosen: Tensor) -> Iterator[None]:
        """Let the language head see these positions of a flattened batch only.

        The models' own `logits_to_keep` takes a mask, and the host waits for the device to count it.
        """
        hook = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, inputs: (inputs[0].flatten(0, 1).index_select(0, chosen),)
        )
        try:
            yield
        finally:
            hook.remove()

    def _nothing(self, inputs: Inputs) -> Tensor | float:
        """Zero, for which the eye has run on the dummy picture if the batch has none."""
        needed = self.eye and (self.sharded or not all(map(is_frozen, self.eye)))
        if not needed or not inputs.keys().isdisjoint(self.dummy):
            return 0.0
        seen = see(self.backbone, self.dummy_on_device)
        deep = getattr(seen, "deepstack_features", None) or []
        return sum((piece.float() * 0).sum() for group in (seen.pooler_output, *deep) for piece in group)
