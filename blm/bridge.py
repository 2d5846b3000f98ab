"""The bridge: a Perceiver that turns hidden states H_k into a few intent tokens.

Shape legend: B batch, L prompt positions, d hidden size of the backbone, M latents, z their width.
A Perceiver (arXiv 2103.03206) in the role of FLARE's query former (arXiv 2505.15659).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blm.layers import Attention, feed_forward
from blm.types import BlmError, require_numbers


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """Size of the bridge."""

    width: int = 128
    """Width z of an intent token; a multiple of `heads`."""
    latents: int = 8
    """Number M of intent tokens per observation."""
    blocks: int = 2
    """Number of Perceiver blocks."""
    heads: int = 4
    """Number of attention heads."""

    def __post_init__(self) -> None:
        require_numbers(self, **dict.fromkeys(("width", "latents", "blocks", "heads"), (1, 100_000)))
        if min(self.width, self.latents, self.blocks, self.heads) < 1 or self.width % self.heads:
            raise BlmError(f"bridge: all fields must be positive and width a multiple of heads, got {self}")


class PerceiverBlock(nn.Module):
    """Pre-norm block: cross-attention to hidden states, self-attention of latents, feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.cross_norm, self.self_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross, self.self = Attention(width, width, heads), Attention(width, width, heads)
        self.feed_forward = feed_forward(width)

    def forward(self, z_BMz: Tensor, context_BLz: Tensor, mask_BL: Tensor) -> Tensor:
        z_BMz = z_BMz + self.cross(self.cross_norm(z_BMz), context_BLz, mask_BL)
        normed = self.self_norm(z_BMz)
        z_BMz = z_BMz + self.self(normed, normed)
        return z_BMz + self.feed_forward(z_BMz)


class Perceiver(nn.Module):
    """LayerNorm -> linear -> Perceiver blocks -> LayerNorm.

    Without position embeddings: hidden states already encode their positions.
    """

    def __init__(self, config: BridgeConfig, hidden_size: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, config.width))
        self.latents = nn.Parameter(torch.randn(config.latents, config.width) * 0.02)
        self.blocks = nn.ModuleList(PerceiverBlock(config.width, config.heads) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, hidden_BLd: Tensor, mask_BL: Tensor) -> Tensor:
        """Return intent tokens [B, M, z]. `mask_BL` is True at real positions."""
        context_BLz = self.project(hidden_BLd.to(self.latents.dtype))
        z_BMz = self.latents.expand(hidden_BLd.shape[0], -1, -1)
        for block in self.blocks:
            z_BMz = block(z_BMz, context_BLz, mask_BL)
        return self.norm(z_BMz)
