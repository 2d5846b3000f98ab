"""The diffusion transformer over state, noised actions and future tokens.

It is conditioned on the intent tokens and the flow time tau. Shape legend: B batch, S tokens (1
state + H actions + M future), w width, M intent tokens, z their width. Block pattern and
conditioning follow GR00T N1.5: even blocks cross-attend to the intent tokens, odd blocks
self-attend; an embedding of tau scales and shifts the first norm of each block and the final norm
(AdaLN).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blm.layers import Attention, feed_forward

IntentCache = list[tuple[Tensor, Tensor] | None]
"""Keys and values of the intent tokens for each block; None for blocks of self-attention."""


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

    def forward(self, x_BSw: Tensor, time_Bw: Tensor) -> Tensor:
        scale, shift = self.modulation(F.silu(time_Bw))[:, None].chunk(2, dim=-1)
        return self.norm(x_BSw) * (1 + scale) + shift


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

    def forward(self, x_BSw: Tensor, intent: Tensor | tuple[Tensor, Tensor], time_Bw: Tensor) -> Tensor:
        """Return [B, S, w]. `intent` is tokens [B, M, z], or their cached keys and values."""
        normed = self.norm(x_BSw, time_Bw)
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

    def forward(
        self, x_BSw: Tensor, intent_BMz: Tensor, tau_B: Tensor, cache: IntentCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return output tokens [B, S, w], and the M future tokens [B, M, w] after block
        `future_layer`.

        Blocks count from 1; the future tokens are the last M of the sequence. `cache` is the result
        of `cache_intent`.
        """
        count = intent_BMz.shape[1]
        time_Bw = self.embed_time(sinusoid(tau_B, x_BSw.shape[-1]).to(x_BSw.dtype))
        future_BMw = x_BSw[:, -count:]
        for number, block in enumerate(self.blocks, start=1):
            cached = cache[number - 1] if cache is not None else None
            x_BSw = block(x_BSw, intent_BMz if cached is None else cached, time_Bw)
            if number == self.future_layer:
                future_BMw = x_BSw[:, -count:]
        return self.norm(x_BSw, time_Bw), future_BMw
