"""Exponential moving average (EMA) of the weights of a module."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from blm.training.loop.distributed import full_tensor


class Ema:
    """A copy of a module whose weights w follow the trained weights v: w <- d w + (1 - d) v.

    The decay d grows to its final value: d = min(decay, (1 + step) / (10 + step)), as in
    TensorFlow's ExponentialMovingAverage. Every process holds the whole copy, even if the trained
    weights are sharded.
    """

    def __init__(self, module: nn.Module, decay: float = 0.995) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards `module` after optimizer step `step` (from 0).

        Buffers are copied.
        """
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        averages = [p.detach() for p in self.module.parameters()]
        trained = [p.detach() for p in module.parameters()]
        assert len(averages) == len(trained)
        if any(isinstance(p, DTensor) for p in trained):
            for average, p in zip(averages, trained, strict=True):  # one whole weight in memory at a time
                average.lerp_(full_tensor(p), weight)
        else:
            torch._foreach_lerp_(averages, trained, weight)
        if buffers := list(module.buffers()):
            torch._foreach_copy_(list(self.module.buffers()), buffers)
