"""The diffusion transformer over state, noised actions and future tokens.

It is conditioned on the intent tokens and the flow time tau. Shape legend: B batch, S tokens (1
state + H actions + M future), w width, M intent tokens, z their width. Block pattern and
conditioning follow GR00T N1.5: even blocks cross-attend to the intent tokens, odd blocks
self-attend; an embedding of tau scales and shifts the first norm of each block and the final norm
(AdaLN).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blm.layers import Attention, feed_forward

IntentCache = list[tuple[Tensor, Tensor] | None]
"""Keys and values of the intent tokens for each block; None for blocks of self-attention."""
Modulation = tuple[Tensor, Tensor]
"""Scale and shift [B, 1, w] of a norm at a flow time; B is 1 if all samples share the flow time."""


@dataclass(frozen=True)
class TimeCache:
    """All that depends on the flow time alone, so that samplers compute it once for all steps."""

    features: Tensor
    """[B, w] the result of `sinusoid`."""
    norms: tuple[Modulation, ...]
    """Of each block, and of the final norm."""


def sinusoid(tau_B: Tensor, width: int) -> Tensor:
    """Return [B, width] sines and cosines of 1000 tau at width / 2 frequencies, 1 to 1e-4."""
    exponents = torch.arange(width // 2, device=tau_B.device, dtype=torch.float32) / (width // 2)
    angles = 1000 * tau_B.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class AdaptiveNorm(nn.Module):
    """Adaptive LayerNorm: the time embedding gives scale and shift, at first 1 and 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def modulate(self, time_Bw: Tensor) -> Modulation:
        """Return scale and shift for embeddings of the flow time."""
        scale, shift = self.modulation(F.silu(time_Bw))[:, None].chunk(2, dim=-1)
        return 1 + scale, shift

    def forward(self, x_BSw: Tensor, time: Tensor | Modulation) -> Tensor:
        """`time` is the embedding [B, w], or what `modulate` made of it."""
        scale, shift = self.modulate(time) if isinstance(time, Tensor) else time
        return self.norm(x_BSw) * scale + shift


class Block(nn.Module):
    """Attention, then feed-forward.

    The block cross-attends to the intent tokens if `intent_width` is given; otherwise it
    self-attends.
    """

    def __init__(self, width: int, heads: int, intent_width: int | None, dropout: float = 0.0) -> None:
        super().__init__()
        self.crosses = intent_width is not None
        self.norm = AdaptiveNorm(width)
        self.attention = Attention(width, intent_width or width, heads)
        self.feed_forward = feed_forward(width)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(
        self, x_BSw: Tensor, intent: Tensor | tuple[Tensor, Tensor], time: Tensor | Modulation
    ) -> Tensor:
        """Return [B, S, w]. `intent` is tokens [B, M, z], or their cached keys and values; `time` an
        embedding [B, w], or what the norm makes of it."""
        normed = self.norm(x_BSw, time)
        x_BSw = x_BSw + self.dropout(self.attention(normed, intent if self.crosses else normed))
        return x_BSw + self.dropout(self.feed_forward(x_BSw))


class DiT(nn.Module):
    """Diffusion transformer over [state; actions; future] tokens, the same for all robots."""

    def __init__(
        self,
        width: int,
        blocks: int,
        heads: int,
        intent_width: int,
        future_layer: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.future_layer = future_layer
        self.embed_time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, intent_width if index % 2 == 0 else None, dropout) for index in range(blocks)
        )
        self.norm = AdaptiveNorm(width)

    def cache_intent(self, intent_BMz: Tensor) -> IntentCache:
        """Return keys and values of the intent tokens per block, for all flow times."""
        blocks = (block for block in self.blocks if isinstance(block, Block))
        return [block.attention.keys_values(intent_BMz) if block.crosses else None for block in blocks]

    def cache_time(self, steps: int, like: Tensor) -> list[TimeCache]:
        """Return a cache for each of the flow times 0, 1 / steps, .., on the device and in the
        precision of `like`.

        They are computed there and all at once: a GPU would have to be waited for to copy them.
        """
        tau_B = torch.arange(steps, device=like.device, dtype=torch.float32) / steps
        features_Bw = sinusoid(tau_B, self.norm.modulation.in_features).to(like.dtype)
        time_Bw = self.embed_time(features_Bw)
        norms = [block.norm for block in self.blocks if isinstance(block, Block)] + [self.norm]
        found = [norm.modulate(time_Bw) for norm in norms]
        return [
            TimeCache(
                features_Bw[row : row + 1],
                tuple((scale[row : row + 1], shift[row : row + 1]) for scale, shift in found),
            )
            for row in range(steps)
        ]

    def forward(
        self,
        x_BSw: Tensor,
        intent_BMz: Tensor,
        tau: Tensor | TimeCache,
        cache: IntentCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return output tokens [B, S, w], and the M future tokens [B, M, w] after block
        `future_layer`.

        Blocks count from 1; the future tokens are the last M of the sequence. `tau` is [B], or a
        result of `cache_time`; `cache` is the result of `cache_intent`.
        """
        count = intent_BMz.shape[1]
        times: Sequence[Tensor | Modulation]
        if isinstance(tau, TimeCache):
            times = tau.norms
        else:
            time_Bw = self.embed_time(sinusoid(tau, x_BSw.shape[-1]).to(x_BSw.dtype))
            times = [time_Bw] * (len(self.blocks) + 1)
        future_BMw = x_BSw[:, -count:]
        for number, block in enumerate(self.blocks, start=1):
            cached = cache[number - 1] if cache is not None else None
            x_BSw = block(x_BSw, intent_BMz if cached is None else cached, times[number - 1])
            if number == self.future_layer:
                future_BMw = x_BSw[:, -count:]
        return self.norm(x_BSw, times[-1]), future_BMw
