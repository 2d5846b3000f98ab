"""The loss of Stage I: cross-entropy of the assistant's tokens; the language head runs on them only."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from blm.backbone import Backbone
from blm.training.packing import RowBatch
from blm.training.rows import unpack_pixels


def answer_loss(backbone: Backbone, batch: RowBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Return the mean cross-entropy of the answers: the model's own loss with labels -100 elsewhere."""
    inputs = backbone.place(batch.inputs)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = unpack_pixels(backbone, inputs["pixel_values"]).to(backbone.model.dtype)
    learn = batch.learn.to(inputs["input_ids"].device)[:, 1:]
    hidden = backbone.model.base_model(**inputs, use_cache=False).last_hidden_state
    logits = backbone.model.get_output_embeddings()(hidden[:, :-1][learn]).float()
    targets = inputs["input_ids"][:, 1:][learn]
    return F.cross_entropy(logits, targets), {
        "token_accuracy": (logits.argmax(-1) == targets).float().mean(),
        "answer_tokens": float(len(targets)),
    }
