"""Weights with which an untrained transformer continues a text as it went on before.

These are the induction heads of "In-context Learning and Induction Heads" (Olsson et al., 2022).
Training a nano found them only after minutes on text alone, or never (docs/LOG.md); they stay
trainable.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaModel

EMBEDDED = 0.06
"""Standard deviation of an embedding's numbers: about 1 / sqrt(width); 0.02 is for wide models."""
NEAR = 150
"""A text is found again over this many places: about a question and a thought."""
QUIET, CARRY, WRITE = 0.1, 2.0, 10.0
"""What blocks add, times what the usual initialisation has; what stood before, and what is copied,
times an embedding."""
LOOK, MATCH = 40.0, 20.0
"""Largest logits of heads that look back, and of those that look for a text."""


@torch.no_grad()
def init_induction_heads(model: LlamaModel) -> None:
    """Set the first two blocks of an even number of heads, with biases, in place.

    Half of the heads of block 0 tell each place which token stood one place before, the others
    which stood two before. Half of those of block 1 look for the place whose two predecessors are
    the present token and the one before it, and write what stands there.
    """
    blocks = cast(list[LlamaDecoderLayer], [*model.layers])
    for block in blocks:  # else tokens drown in what random blocks add to them
        block.self_attn.o_proj.weight.mul_(QUIET)
        cast(nn.Linear, block.mlp.down_proj).weight.mul_(QUIET)
    heads = model.config.num_attention_heads
    frequencies: Tensor = model.rotary_emb.inv_freq
    for head in range(heads // 2):
        carried, *written = _carry(blocks[0].self_attn, (head, heads // 2 + head), frequencies)
        _find(blocks[1].self_attn, head, frequencies, carried, written)


def _carry(
    attention: LlamaAttention, heads: tuple[int, int], frequencies: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Let two heads look one and two places back, and write what they see.

    Returns [D, C] each, for a head of size D: what they see of a token, and where each writes it.
    """
    dims, width = attention.head_dim, attention.config.hidden_size
    carried, written = _directions(dims, width), (_directions(dims, width), _directions(dims, width))
    for back, (head, where) in enumerate(zip(heads, written, strict=True), start=1):
        rows = _rows(attention, head)
        _look_back(attention, rows, frequencies, back)
        attention.v_proj.weight[rows] = carried
        attention.o_proj.weight[:, rows] = CARRY * EMBEDDED * where.T
    return carried, *written


def _look_back(attention: LlamaAttention, rows: slice, frequencies: Tensor, back: int) -> None:
    """Let a head look `back` places back: with constant query and key, RoPE's phases add up there
    only."""
    fast = (frequencies > 1 / 50).float()
    size = (LOOK * math.sqrt(attention.head_dim) / fast.sum()).sqrt() * fast
    turn = frequencies * back
    attention.q_proj.bias[rows] = torch.cat([size, 0 * size])
    attention.k_proj.bias[rows] = torch.cat([size * turn.cos(), size * turn.sin()])
    attention.q_proj.weight[rows] *= 0.1
    attention.k_proj.weight[rows] *= 0.1


def _find(
    attention: LlamaAttention, head: int, frequencies: Tensor, carried: Tensor, written: list[Tensor]
) -> None:
    """Let a head look for the present token and the one before it, among what was written one
    and two places after them, in the numbers that RoPE hardly turns; and copy the token that it
    finds."""
    dims, width = attention.head_dim, attention.config.hidden_size
    rows, half = _rows(attention, head), dims // 2
    slow = [i for i in range(half) if float(frequencies[i]) * NEAR < math.pi / 2]
    one, two = ([d for i in slow[start::2] for d in (i, i + half)] for start in (0, 1))
    query, key = torch.zeros(2, dims, width)
    ends = len(one), len(one) + len(two)
    for places, of, asked, found in (
        (one, slice(0, ends[0]), carried, written[0]),
        (two, slice(*ends), written[0], written[1]),
    ):
        sharp = math.sqrt(MATCH * math.sqrt(dims) / len(places))
        query[places], key[places] = sharp * asked[of], sharp * found[of]
    for projection, value in ((attention.q_proj, query), (attention.k_proj, key)):
        projection.weight[rows] = value + 0.05 * projection.weight[rows]
    copied = _directions(dims, width)
    attention.v_proj.weight[rows] = copied
    attention.o_proj.weight[:, rows] = WRITE * EMBEDDED * copied.T


def _rows(attention: LlamaAttention, head: int) -> slice:
    return slice(head * attention.head_dim, (head + 1) * attention.head_dim)


def _directions(count: int, width: int) -> Tensor:
    """[count, width]: random orthonormal rows."""
    return torch.linalg.qr(torch.randn(width, count)).Q.T
