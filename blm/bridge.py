"""The intent bridge: hidden states of the language model become a few intent tokens for the policy.

Shape legend: B batch, L prompt positions, d hidden size of the backbone, M latents, z their width.
A Perceiver (arXiv 2103.03206) in the role of FLARE's query former (arXiv 2505.15659).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blm.types import BlmError, require_numbers


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    width: int = 128
    """z, width of an intent token; a multiple of `heads`."""
    latents: int = 8
    """M, intent tokens per observation."""
    blocks: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        require_numbers(self, **dict.fromkeys(("width", "latents", "blocks", "heads"), (1, 100_000)))
        if min(self.width, self.latents, self.blocks, self.heads) < 1 or self.width % self.heads:
            raise BlmError(f"bridge: all fields must be positive and width a multiple of heads, got {self}")


class Attention(nn.Module):
    """Multi-head attention of queries [B, Q, width] over a context [B, L, context_width]."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, context_BLc: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, heads, L, width / heads] of a context, to be used several times."""
        k, v = self.key_value(context_BLc).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return k, v

    def forward(
        self, x_BQw: Tensor, context: Tensor | tuple[Tensor, Tensor], mask_BL: Tensor | None = None
    ) -> Tensor:
        """Return [B, Q, width]. `context`: [B, L, context_width], or its keys and values.

        Context positions where `mask_BL` is False are ignored.
        """
        q = self.query(x_BQw).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = context if isinstance(context, tuple) else self.keys_values(context)
        mask = None if mask_BL is None else mask_BL[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


def feed_forward(width: int) -> nn.Sequential:
    """Pre-normalised two-layer network of four times the width."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width),
        nn.GELU(approximate="tanh"),
        nn.Linear(4 * width, width),
    )


class PerceiverBlock(nn.Module):
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
    """LayerNorm -> linear -> Perceiver blocks -> LayerNorm; the hidden states carry their own positions."""

    def __init__(self, config: BridgeConfig, hidden_size: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, config.width))
        self.latents = nn.Parameter(torch.randn(config.latents, config.width) * 0.02)
        self.blocks = nn.ModuleList(PerceiverBlock(config.width, config.heads) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, hidden_BLd: Tensor, mask_BL: Tensor) -> Tensor:
        """Return intent tokens [B, M, z]; `hidden_BLd` of any precision, `mask_BL` True at real positions."""
        context_BLz = self.project(hidden_BLd.to(self.latents.dtype))
        z_BMz = self.latents.expand(len(hidden_BLd), -1, -1)
        for block in self.blocks:
            z_BMz = block(z_BMz, context_BLz, mask_BL)
        return self.norm(z_BMz)
