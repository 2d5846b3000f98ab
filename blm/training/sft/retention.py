"""Retention: the distance of a fine-tuned model from its base on held-out text.

It is measured as KL divergence and perplexity. Per token, with p the base and q the fine-tuned
model under teacher forcing (in nats):

    KL(p || q) = sum_v p(v) (log p(v) - log q(v))
    NLL(q) = -log q(next token),  perplexity = exp(mean NLL)

The divergence is the more sensitive of the two: perplexity may stay equal while a model's answers
change.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from blm.backbone import Backbone
from blm.corpora.curation.replay import topic_texts
from blm.types import BlmError

RESAMPLES = 2000
"""Number of bootstrap resamples of the blocks, for 95 % intervals (Efron 1979)."""


def held_out_texts() -> list[str]:
    """Return English prose that ships with Python and that no replay prompt is about.

    It is a part of Python's manual, which differs a little between versions, so compare runs of one
    version.
    """
    return list(topic_texts(held_out=True).values())


def read_texts(path: Path, size: int = 1500) -> list[str]:
    """Split a text file at blank lines into parts of at least `size` characters.

    Raises BlmError for a file that cannot be read.
    """
    try:
        paragraphs = re.split(r"\n\s*\n", path.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError) as error:
        raise BlmError(f"cannot read the held-out text '{path}': {error}") from error
    texts = [""]
    for paragraph in paragraphs:
        if len(texts[-1]) >= size:
            texts.append("")
        texts[-1] += paragraph + "\n\n"
    return texts


@dataclass(frozen=True, kw_only=True)
class RetentionMeasure:
    """How far a tuned model has moved from its base on held-out text; intervals are 95 %."""

    kl: float
    """Divergence of the tuned model from the base [nats per token]."""
    kl_low: float
    kl_high: float
    perplexity_base: float
    perplexity: float
    nll_rise: float
    """Negative log-likelihood, tuned minus base [nats per token]."""
    nll_rise_low: float
    nll_rise_high: float
    text_tokens: float
    """Tokens that were compared."""


class Retention:
    """Compares a model in training with its base on some texts; create it before training.

    It keeps the last hidden states of the base and a copy of its head, so the base's distributions
    are reproduced exactly and over the whole vocabulary. The copy costs memory (113 MB for smol).
    """

    def __init__(self, backbone: Backbone, texts: Sequence[str] = (), *, length: int = 64) -> None:
        """Keep the first `length` tokens of every text; without texts, of `held_out_texts()`.

        Raises BlmError when no text has two tokens.
        """
        self.texts, self.length = tuple(texts) or tuple(held_out_texts()), length
        self.blocks = self._blocks(backbone)
        if not self.blocks:
            raise BlmError("no held-out text has two or more tokens, which retention needs")
        self.head = copy.deepcopy(_head(backbone)).requires_grad_(False)
        self.hidden = list(self._read(backbone))

    def measure(self, backbone: Backbone) -> RetentionMeasure:
        """Compare `backbone`, the base or fine-tuned from it, with the base; intervals are 95 %.

        Raises BlmError when the two split the texts into other tokens.
        """
        if self._blocks(backbone) != self.blocks or _head(backbone).weight.shape != self.head.weight.shape:
            raise BlmError(
                "base and fine-tuned model have different tokenizers; the divergence needs the same tokens"
            )
        rows = [
            self._compare(tokens, base, tuned, _head(backbone))
            for tokens, base, tuned in zip(self.blocks, self.hidden, self._read(backbone), strict=True)
        ]
        counts = np.array([len(tokens) - 1 for tokens in self.blocks])
        sums = np.array(rows)
        kl, base, tuned = sums.sum(0) / counts.sum()
        rng = np.random.default_rng(0)
        picked = rng.integers(len(rows), size=(RESAMPLES, len(rows)))
        drawn = sums[picked].sum(1) / counts[picked].sum(1)[:, None]
        (kl_low, kl_high), (low, high) = (
            np.quantile(values, (0.025, 0.975)) for values in (drawn[:, 0], drawn[:, 2] - drawn[:, 1])
        )
        return RetentionMeasure(
            kl=float(kl),
            kl_low=float(kl_low),
            kl_high=float(kl_high),
            perplexity_base=float(np.exp(base)),
            perplexity=float(np.exp(tuned)),
            nll_rise=float(tuned - base),
            nll_rise_low=float(low),
            nll_rise_high=float(high),
            text_tokens=float(counts.sum()),
        )

    def _blocks(self, backbone: Backbone) -> list[list[int]]:
        encode = backbone.processor.tokenizer.backend_tokenizer.encode
        cut = [encode(text, add_special_tokens=False).ids[: self.length] for text in self.texts]
        return [tokens for tokens in cut if len(tokens) > 1]

    @torch.no_grad()
    def _read(self, backbone: Backbone) -> Iterator[Tensor]:
        """Return the last hidden states [n, d] of each block, computed alone for equal bits."""
        training = backbone.model.training
        backbone.model.eval()
        try:
            for tokens in self.blocks:
                ids = torch.tensor([tokens], device=backbone.model.device)
                yield backbone.decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
        finally:
            backbone.model.train(training)

    @torch.no_grad()
    def _compare(self, tokens: list[int], base: Tensor, tuned: Tensor, head: nn.Linear) -> list[float]:
        """Return the sums over one block: KL, NLL of the base, NLL of the fine-tuned model."""
        log_p = self.head.to(tuned.device)(base.to(tuned)[:-1]).float().log_softmax(-1)
        log_q = head(tuned[:-1]).float().log_softmax(-1)
        right = torch.tensor(tokens[1:], device=log_q.device)[:, None]
        parts = (log_p.exp() * (log_p - log_q), -log_p.gather(1, right), -log_q.gather(1, right))
        return [float(part.sum(dtype=torch.float64)) for part in parts]


def _head(backbone: Backbone) -> nn.Linear:
    head = backbone.model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head
