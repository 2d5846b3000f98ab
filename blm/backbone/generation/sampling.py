"""Choosing the next token from a model's scores. Shapes: V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from blm.types import Sampling

GREEDY_BELOW = 1e-5
"""A lower temperature means the likeliest token, as in vLLM (`_SAMPLING_EPS`): scores of size 30 are rounded
to 2e-6 in float32, so from here on rounding would decide, and further down the division overflows."""


class ScoreError(RuntimeError):
    """The model gave scores from which no token can be chosen."""


def is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < GREEDY_BELOW


def choose_token(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return a token for scores [V], which may be -inf (never this token).

    Raises ScoreError when the highest score is not finite: NaN, infinite, or all tokens are forbidden.
    """
    scores = scores.float()
    highest = scores.amax()  # NaN if one score is
    if not bool(highest.isfinite()):
        raise ScoreError(f"the model gave no usable scores: the highest is {float(highest)}")
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
    """Return scores [V] with those of the `seen` tokens [V] (bool) made smaller; see `Sampling`."""
    smaller = torch.where(scores > 0, scores / penalty, scores * penalty)
    return torch.where(seen, smaller, scores)
