"""Sampling: choosing the next token from the model's logits. Shapes: V vocabulary."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from blm.backbone.generation.batch import GeneratedSequence, fail
from blm.types import Sampling

GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy, as in vLLM (`_SAMPLING_EPS`).

Logits of size 30 are rounded to 2e-6 in float32, so below this temperature rounding would decide,
and at still lower ones the division overflows.
"""


class ScoreError(RuntimeError):
    """The model's logits are not finite, or forbid every token."""


def is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < GREEDY_BELOW


def choose_token(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return a token id for logits [V]; a logit of -inf forbids its token.

    Raises ScoreError when the highest logit is not finite: NaN, infinite, or all tokens are
    forbidden.
    """
    scores = scores.float()
    highest = scores.amax()  # NaN if one score is
    if not bool(highest.isfinite()):
        raise ScoreError(f"the model's logits are not usable: the highest is {float(highest)}")
    if is_greedy(sampling):
        return int(scores.argmax())
    shares = ((scores.double() - highest) / sampling.temperature).softmax(-1).float().cpu()
    if sampling.top_p < 1:
        ordered, order = shares.sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        outside[0] = False  # one token stays, however small top_p is
        shares[order[outside]] = 0
    return int(torch.multinomial(shares, 1, generator=generator))


def penalise(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits [V] with the repetition penalty applied to the `seen` tokens [V] (bool).

    The rule is that of CTRL (Keskar et al., 2019); see `Sampling`.
    """
    smaller = torch.where(scores > 0, scores / penalty, scores * penalty)
    return torch.where(seen, smaller, scores)


class TokenChooser:
    """Appends the next token to sequences, each with its own sampling settings."""

    def __init__(self, end_tokens: Collection[int], repetition_penalty: float) -> None:
        """`repetition_penalty`: for sequences whose sampling does not set one; 1 is no penalty."""
        self.end_tokens = set(end_tokens)
        self.repetition_penalty = repetition_penalty

    def choose(self, sequences: Sequence[GeneratedSequence], logits: Tensor) -> None:
        """Append a token to each sequence, for logits [B, V].

        A sequence for which no token can be chosen gets an `error`.
        """
        scores = logits.float()
        # one tensor, so that the host waits for the device once
        choices = torch.stack([scores.argmax(-1), scores.amax(-1).isfinite()], dim=1).tolist()
        for sequence, row, (greedy, finite) in zip(sequences, scores, choices, strict=True):
            try:
                if not finite:
                    raise ScoreError("the model's logits are not finite")
                token = greedy if self._takes_likeliest(sequence.sampling) else self._sample(sequence, row)
            except Exception as error:
                fail([sequence], error)
                continue
            sequence.tokens.append(token)
            if sequence.seen is not None:
                sequence.seen[token] = True
            if token in self.end_tokens:
                sequence.ended = "stop"
            elif len(sequence.tokens) >= sequence.sampling.max_tokens:
                sequence.ended = "length"

    def _penalty_of(self, sampling: Sampling) -> float:
        penalty = sampling.repetition_penalty
        return self.repetition_penalty if penalty is None else penalty

    def _takes_likeliest(self, sampling: Sampling) -> bool:
        return is_greedy(sampling) and self._penalty_of(sampling) == 1.0

    def _sample(self, sequence: GeneratedSequence, scores: Tensor) -> int:
        penalty = self._penalty_of(sequence.sampling)
        if penalty != 1.0:
            if sequence.seen is None:
                sequence.seen = torch.zeros_like(scores, dtype=torch.bool)
                sequence.seen[sequence.prompt] = True
            scores = penalise(scores, sequence.seen, penalty)
        return choose_token(scores, sequence.sampling, sequence.generator)
