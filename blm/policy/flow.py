"""Flow matching: probability path, training target, distribution of flow times, Euler sampler.

    A^tau = tau A + (1 - tau) eps,   d/dtau A^tau = A - eps,   tau = 0 noise, tau = 1 data.

This is the direction of GR00T N1.5 (openpi writes the same path with t = 1 - tau: its t = 1 is
noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BETA_SHAPE = 1.5
"""Parameter a of Beta(a, 1), the distribution of flow times in openpi and GR00T N1.5.

Noisy actions get more weight.
"""
NOISE_SCALE = 0.999
"""Parameter s of t = (s - u) / s in GR00T N1.5."""


def sample_time(count: int, generator: torch.Generator) -> Tensor:
    """Return flow times tau [count] in [0, 1], most of them near noise.

    u ~ Beta(1.5, 1), tau = (0.999 - u) / 0.999. Beta(a, 1) is sampled by the inverse of its
    distribution function: u = U^(1/a). Once in 670 draws u > 0.999, so tau < 0; it is clamped to 0.
    """
    u = torch.rand(count, generator=generator) ** (1 / BETA_SHAPE)
    return ((NOISE_SCALE - u) / NOISE_SCALE).clamp(min=0.0)


def time_quantile(tau: Tensor) -> Tensor:
    """Return U in [0, 1] of which `sample_time` made these flow times; it is uniform."""
    return (NOISE_SCALE * (1 - tau)) ** BETA_SHAPE


def interpolate(actions: Tensor, noise: Tensor, tau_B: Tensor) -> Tensor:
    """Return A^tau for actions and noise of one shape [B, ...]."""
    tau = tau_B.view(-1, *[1] * (actions.ndim - 1))
    return tau * actions + (1 - tau) * noise


def target(actions: Tensor, noise: Tensor) -> Tensor:
    """Return the training target, the velocity A - eps; it does not depend on tau."""
    return actions - noise


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Return standard normal noise [len(seeds), *shape]; row i depends on seed i alone.

    Always drawn on the CPU, so that a seed gives the same noise on every device.
    """
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


GUIDANCE = 5.0
"""beta, the largest weight of guidance in real-time chunking."""


@dataclass(frozen=True)
class ActionPrefix:
    """Real-time chunking: the rest of the current chunk, which the next chunk should continue."""

    actions: Tensor
    """[B, H, D] normalised actions."""
    weights: Tensor
    """[B, H] in 0 .. 1: how strongly each action of the next chunk is guided towards it."""

    def to(self, device: torch.device) -> ActionPrefix:
        """Return a copy on this device."""
        return ActionPrefix(self.actions.to(device), self.weights.to(device))


def prefix_weights(length: int, inference_delay: int, horizon: int) -> Tensor:
    """Return the weights [horizon] of an action prefix of `length` actions, in 0 .. 1.

    1 for the first `inference_delay` actions, which are executed before the new chunk arrives, 0
    from `length` on, and exponentially decreasing in between: as in "Real-Time Execution of Action
    Chunking Flow Policies" (Black et al., 2025, arXiv 2506.07339).
    """
    steps = torch.arange(horizon, dtype=torch.float32)
    share = ((length - steps) / (length - inference_delay + 1)).clamp(0, 1)
    decaying = share * torch.expm1(share) / math.expm1(1)
    return torch.where(steps < inference_delay, torch.ones(()), decaying) * (steps < length)


def guided(
    velocity: Callable[[Tensor, Tensor], Tensor], prefix: ActionPrefix
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a velocity field whose samples are close to an action prefix, for real-time chunking.

    It adds the gradient of the weighted distance between prefix and predicted actions (Pokle et
    al., 2023, arXiv 2310.04432).
    """

    def guided_velocity(x: Tensor, tau_B: Tensor) -> Tensor:
        tau = tau_B.view(-1, *[1] * (x.ndim - 1))
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            speed = velocity(x, tau_B)
            clean = x + (1 - tau) * speed
            error = ((prefix.actions - clean) * prefix.weights[..., None]).detach()
            (gradient,) = torch.autograd.grad(clean, x, error)
        variance = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        strength = ((1 - tau) / (tau * variance).clamp_min(1e-9)).clamp_max(GUIDANCE)
        return speed.detach() + strength * gradient

    return guided_velocity


def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Integrate `velocity(x, tau_B)` from tau = 0 to 1 in equal steps, from `noise` [B, ...]."""
    x = noise
    for step in range(steps):
        tau_B = torch.full((x.shape[0],), step / steps, device=x.device, dtype=x.dtype)
        x = x + velocity(x, tau_B) / steps
    return x
