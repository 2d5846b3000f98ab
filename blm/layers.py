"""Transformer layers that the bridge and the diffusion transformer share.

Shape legend: B batch, Q queries, L context positions, w width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention of queries [B, Q, width] over a context [B, L, context_width]."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, context_BLc: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, heads, L, width / heads] of a context, for caching."""
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
    """Return a pre-norm feed-forward network of LayerNorm, linear (4 x width), GELU, linear."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width),
        nn.GELU(approximate="tanh"),
        nn.Linear(4 * width, width),
    )
