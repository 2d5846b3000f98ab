"""Per-embodiment encoders and decoder: one indexed weight [E, in, out] for all robots.

Shape legend: B batch, E embodiments, H action steps, D padded dimension, w width. A further arm
adds one row to each weight and nothing else (`with_embodiments`). The layers follow GR00T N1.5's
category-specific layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blm.policy.dit import TimeCache, sinusoid

Runs = tuple[tuple[int, int], ...]
"""The robots of a batch as (row of the indexed weights, number of consecutive samples), on the host."""


def runs_of(rows: Iterable[int]) -> Runs:
    """Return the runs of a batch whose samples have these rows, in order."""
    return tuple((row, len(list(same))) for row, same in groupby(rows))


class IndexedLinear(nn.Module):
    """A linear layer with one weight matrix per embodiment, chosen by index per sample.

    Both forms of the index give the same result up to rounding. A tensor [B] gathers one matrix per
    sample: B x in x out numbers, and as many for their gradients. `Runs` multiply the samples of a
    run by their matrix where it is, and their lengths are known on the host, so that no GPU has to
    be waited for.
    """

    def __init__(self, embodiments: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5  # as torch.nn.Linear
        self.weight = nn.Parameter(torch.empty(embodiments, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(embodiments, outputs).uniform_(-bound, bound))

    def forward(self, x_BTi: Tensor, index: Tensor | Runs) -> Tensor:
        if isinstance(index, tuple):
            return self._by_runs(x_BTi, index)
        weight_Bio, bias_Bo = self.weight.index_select(0, index), self.bias.index_select(0, index)
        return torch.baddbmm(bias_Bo[:, None], x_BTi, weight_Bio)

    def _by_runs(self, x_BTi: Tensor, runs: Runs) -> Tensor:
        # unbind, because each `weight[row]` would have a gradient of the size of all rows
        weights_io, biases_o = self.weight.unbind(), self.bias.unbind()
        parts = x_BTi.split([count for _, count in runs])
        products = [
            torch.addmm(biases_o[row], part.flatten(0, 1), weights_io[row])
            for part, (row, _) in zip(parts, runs, strict=True)
        ]
        return torch.cat(products).unflatten(0, x_BTi.shape[:2])


class IndexedMLP(nn.Module):
    """Two indexed layers with a ReLU between them: state encoder and action decoder."""

    def __init__(self, embodiments: int, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.first = IndexedLinear(embodiments, inputs, width)
        self.second = IndexedLinear(embodiments, width, outputs)

    def forward(self, x_BTi: Tensor, index: Tensor | Runs) -> Tensor:
        return self.second(F.relu(self.first(x_BTi, index)), index)


class ActionEncoder(nn.Module):
    """Encodes noised actions [B, H, D] and their flow time as tokens [B, H, w]."""

    def __init__(self, embodiments: int, dim: int, width: int) -> None:
        super().__init__()
        self.first = IndexedLinear(embodiments, dim, width)
        self.second = IndexedLinear(embodiments, 2 * width, width)
        self.third = IndexedLinear(embodiments, width, width)

    def forward(self, actions_BHD: Tensor, tau: Tensor | TimeCache, index: Tensor | Runs) -> Tensor:
        """`tau` is [B], or the time cache of all samples."""
        tokens_BHw = self.first(actions_BHD, index)
        if isinstance(tau, TimeCache):
            time_Bw = tau.features
        else:
            time_Bw = sinusoid(tau, tokens_BHw.shape[-1]).to(tokens_BHw.dtype)
        time_BHw = time_Bw[:, None].expand_as(tokens_BHw)
        mixed_BHw = F.silu(self.second(torch.cat([tokens_BHw, time_BHw], dim=-1), index))
        return self.third(mixed_BHw, index)


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
