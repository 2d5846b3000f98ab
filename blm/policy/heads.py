"""Per-embodiment encoders and decoder: one indexed weight [E, in, out] for all robots.

Shape legend: B batch, E embodiments, H action steps, D padded dimension, w width. A further arm
adds one row to each weight and nothing else (`with_embodiments`). The layers follow GR00T N1.5's
category-specific layers.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blm.policy.dit import sinusoid


class IndexedLinear(nn.Module):
    """A linear layer with one weight matrix per embodiment, chosen by index per sample."""

    def __init__(self, embodiments: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5  # as torch.nn.Linear
        self.weight = nn.Parameter(torch.empty(embodiments, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(embodiments, outputs).uniform_(-bound, bound))

    def forward(self, x_BTi: Tensor, index_B: Tensor) -> Tensor:
        weight_Bio, bias_Bo = self.weight.index_select(0, index_B), self.bias.index_select(0, index_B)
        return torch.baddbmm(bias_Bo[:, None], x_BTi, weight_Bio)


class IndexedMLP(nn.Module):
    """Two indexed layers with a ReLU between them: state encoder and action decoder."""

    def __init__(self, embodiments: int, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.first = IndexedLinear(embodiments, inputs, width)
        self.second = IndexedLinear(embodiments, width, outputs)

    def forward(self, x_BTi: Tensor, index_B: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x_BTi, index_B)), index_B)


class ActionEncoder(nn.Module):
    """Encodes noised actions [B, H, D] and their flow time as tokens [B, H, w]."""

    def __init__(self, embodiments: int, dim: int, width: int) -> None:
        super().__init__()
        self.first = IndexedLinear(embodiments, dim, width)
        self.second = IndexedLinear(embodiments, 2 * width, width)
        self.third = IndexedLinear(embodiments, width, width)

    def forward(self, actions_BHD: Tensor, tau_B: Tensor, index_B: Tensor) -> Tensor:
        tokens_BHw = self.first(actions_BHD, index_B)
        time_BHw = sinusoid(tau_B, tokens_BHw.shape[-1]).to(tokens_BHw.dtype)[:, None].expand_as(tokens_BHw)
        mixed_BHw = F.silu(self.second(torch.cat([tokens_BHw, time_BHw], dim=-1), index_B))
        return self.third(mixed_BHw, index_B)


M = TypeVar("M", bound=nn.Module)


def with_embodiments(module: M, count: int) -> M:
    """Return a copy whose indexed layers have rows for `count` more robots; nothing else differs.

    A new row is initialised with the mean of the old ones.
    """
    grown = copy.deepcopy(module)
    for layer in grown.modules():
        if isinstance(layer, IndexedLinear):
            for name in ("weight", "bias"):
                old = getattr(layer, name).detach()
                new = old.mean(0, keepdim=True).expand(count, *old.shape[1:])
                setattr(layer, name, nn.Parameter(torch.cat([old, new])))
    return grown
