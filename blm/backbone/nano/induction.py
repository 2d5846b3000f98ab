"""Initialisation with induction heads, with which an untrained transformer can copy earlier text.

"In-context Learning and Induction Heads" (Olsson et al., 2022): where the last tokens occurred
before, the heads predict the token that followed them. Training nano formed such heads only after
minutes on text alone, or never (docs/LOG.md). The weights stay trainable.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaModel

EMBEDDED = 0.06
"""Standard deviation of embedding weights: about 1 / sqrt(width); 0.02 is for wide models."""
NEAR = 150
"""Maximum distance of the earlier text [tokens]: about a question and a thought."""
QUIET, CARRY, WRITE = 0.1, 2.0, 10.0
"""Scale of the output of blocks, relative to the usual initialisation; scales of the previous-token
output and of the copied token, relative to an embedding."""
LOOK, MATCH = 40.0, 20.0
"""Maximum attention logits of previous-token heads and of induction heads."""


@torch.no_grad()
def init_induction_heads(model: LlamaModel) -> None:
    """Initialise induction heads in the first two blocks, in place.

    In block 0, half of the heads copy the token one position back, the others the token two
    positions back (previous-token heads). In block 1, half of the heads attend to the position
    whose two predecessors are the current token and the one before it, and copy the token at that
    position (induction heads). The model must have an even number of heads, and biases in its
    attention.
    """
    blocks = cast(list[LlamaDecoderLayer], [*model.layers])
    for block in blocks:  # otherwise the output of random blocks is larger than the embeddings
        block.self_attn.o_proj.weight.mul_(QUIET)
        cast(nn.Linear, block.mlp.down_proj).weight.mul_(QUIET)
    heads = model.config.num_attention_heads
    frequencies: Tensor = model.rotary_emb.inv_freq
    for head in range(heads // 2):
        pair = (head, heads // 2 + head)
        carried, *written = _init_previous_token_heads(blocks[0].self_attn, pair, frequencies)
        _init_induction_head(blocks[1].self_attn, head, frequencies, carried, written)


def _init_previous_token_heads(
    attention: LlamaAttention, heads: tuple[int, int], frequencies: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Let two heads copy the tokens one and two positions back.

    Returns directions [D, C] for a head of size D and width C: those that the heads read from an
    embedding, and those that each of them writes to.
    """
    dims, width = attention.head_dim, attention.config.hidden_size
    carried, written = _directions(dims, width), (_directions(dims, width), _directions(dims, width))
    for distance, (head, directions) in enumerate(zip(heads, written, strict=True), start=1):
        rows = _rows(attention, head)
        _attend_back(attention, rows, frequencies, distance)
        attention.v_proj.weight[rows] = carried
        attention.o_proj.weight[:, rows] = CARRY * EMBEDDED * directions.T
    return carried, *written


def _attend_back(attention: LlamaAttention, rows: slice, frequencies: Tensor, distance: int) -> None:
    """Let a head attend `distance` positions back.

    The query and the key are constant, and RoPE's phases align at that distance.
    """
    fast = (frequencies > 1 / 50).float()
    size = (LOOK * math.sqrt(attention.head_dim) / fast.sum()).sqrt() * fast
    angle = frequencies * distance
    attention.q_proj.bias[rows] = torch.cat([size, 0 * size])
    attention.k_proj.bias[rows] = torch.cat([size * angle.cos(), size * angle.sin()])
    attention.q_proj.weight[rows] *= 0.1
    attention.k_proj.weight[rows] *= 0.1


def _init_induction_head(
    attention: LlamaAttention, head: int, frequencies: Tensor, carried: Tensor, written: list[Tensor]
) -> None:
    """Initialise an induction head, which reads the outputs of previous-token heads.

    It matches the current token and the one before it, in the dimensions that RoPE hardly rotates
    over NEAR positions, and copies the token at the matching position.
    """
    dims, width = attention.head_dim, attention.config.hidden_size
    rows, half = _rows(attention, head), dims // 2
    slow = [i for i in range(half) if float(frequencies[i]) * NEAR < math.pi / 2]
    one, two = ([d for i in slow[start::2] for d in (i, i + half)] for start in (0, 1))
    query, key = torch.zeros(2, dims, width)
    ends = len(one), len(one) + len(two)
    for indices, part, query_directions, key_directions in (
        (one, slice(0, ends[0]), carried, written[0]),
        (two, slice(*ends), written[0], written[1]),
    ):
        scale = math.sqrt(MATCH * math.sqrt(dims) / len(indices))
        query[indices] = scale * query_directions[part]
        key[indices] = scale * key_directions[part]
    for projection, value in ((attention.q_proj, query), (attention.k_proj, key)):
        projection.weight[rows] = value + 0.05 * projection.weight[rows]
    copied = _directions(dims, width)
    attention.v_proj.weight[rows] = copied
    attention.o_proj.weight[:, rows] = WRITE * EMBEDDED * copied.T


def _rows(attention: LlamaAttention, head: int) -> slice:
    """Return the rows of a head in the projections of an attention."""
    return slice(head * attention.head_dim, (head + 1) * attention.head_dim)


def _directions(count: int, width: int) -> Tensor:
    """Return random orthonormal rows [count, width]."""
    return torch.linalg.qr(torch.randn(width, count)).Q.T
