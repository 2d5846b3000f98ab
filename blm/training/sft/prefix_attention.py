"""Attention of rows whose turns share a prefix: each turn attends to the prefix and to itself, nothing else.

A dense mask says the same, but costs the square of the row. Here queries of a turn meet only the keys that
they may see: positions are gathered in blocks of about one length, attended, and put back in order. It is an
attention function of transformers (AttentionInterface), so any of its decoders takes it unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from blm.backbone import Backbone

NAME = "blm_turns"
CALL = 2**14
"""What one more call of attention is taken to cost, in products of a query and a key. It decides how many
lengths blocks are padded to; the results do not depend on it."""
Block = tuple[np.ndarray, np.ndarray]
"""Positions of a turn, and those before it that it may see."""


class Turns(NamedTuple):
    """Which positions attend to which, in buckets of N blocks. FSDP looks for tensors in tuples only."""

    queries: tuple[Tensor, ...]
    """[N, Q] each: positions in the flattened batch; a short block repeats its last."""
    keys: tuple[Tensor, ...]
    """[N, K] each."""
    masks: tuple[Tensor, ...]
    """[N, 1, Q, K] each, True where attended."""
    back: Tensor
    """[G * L]: where each position's result is among those of all blocks; padding takes any."""

    def to(self, device: torch.device) -> Turns:
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Turns:
        """Copy to page-locked memory."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Turns:
        queries, keys, masks = (tuple(map(change, parts)) for parts in self[:3])
        return Turns(queries, keys, masks, change(self.back))


def lay_out(owner: np.ndarray, segment_ids: np.ndarray) -> Turns:
    """Return the blocks of sequences [G, L]: `owner` numbers rows, -1 is padding; `segment_ids` as in Row."""
    length, nothing = owner.shape[1], np.zeros(0, dtype=np.int64)
    blocks: list[Block] = []
    for line, (owners, branches) in enumerate(zip(owner, segment_ids, strict=True)):
        for number in range(int(owners.max()) + 1):
            at = np.flatnonzero(owners == number)
            of, at = branches[at], at + line * length
            shared = at[of == 0]
            blocks += [(shared, nothing)] if len(shared) else []
            blocks += [(at[of == turn], shared) for turn in range(1, int(of.max()) + 1)]
    blocks.sort(key=lambda block: len(block[0]))
    back, count = np.zeros(owner.size, dtype=np.int64), 0
    made: list[tuple[Tensor, Tensor, Tensor]] = []
    for bucket in _buckets(blocks):
        made.append(tuple(map(torch.from_numpy, _padded(bucket))))  # type: ignore[arg-type]
        wide = made[-1][0].shape[1]
        for own, _ in bucket:
            back[own] = count + np.arange(len(own))
            count += wide
    queries, keys, masks = zip(*made, strict=True)
    return Turns(queries, keys, masks, torch.from_numpy(back))


def _buckets(blocks: list[Block]) -> list[list[Block]]:
    """Split sorted blocks such that padding each part to its longest costs least, a call each included."""
    own, shared = (np.array([len(block[side]) for block in blocks]) for side in (0, 1))
    best, begins = np.zeros(len(blocks) + 1), np.zeros(len(blocks) + 1, dtype=np.int64)
    for end in range(1, len(blocks) + 1):
        wide = np.maximum.accumulate(shared[:end][::-1])[::-1] + own[end - 1]
        costs = best[:end] + CALL + np.arange(end, 0, -1) * own[end - 1] * wide
        begins[end] = costs.argmin()
        best[end] = costs.min()
    parts, end = [], len(blocks)
    while end:
        parts.append(blocks[begins[end] : end])
        end = int(begins[end])
    return parts[::-1]


def _padded(bucket: list[Block]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries [N, Q], keys [N, S + Q] and mask [N, 1, Q, S + Q] of blocks (own positions, shared ones)."""
    long, shares = (max(len(block[side]) for block in bucket) for side in (0, 1))
    queries = np.stack([np.pad(own, (0, long - len(own)), mode="edge") for own, _ in bucket])
    before = np.stack([np.pad(shared, (0, shares - len(shared))) for _, shared in bucket])
    seen = np.arange(shares) < np.array([len(shared) for _, shared in bucket])[:, None]
    causal = np.tri(long, dtype=bool)
    own = np.broadcast_to(causal, (len(bucket), long, long))
    prefix = np.broadcast_to(seen[:, None], (len(bucket), long, shares))
    return queries, np.concatenate([before, queries], axis=1), np.concatenate([prefix, own], axis=2)[:, None]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    turns: Turns | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention [G, heads, L, D] -> [G, L, heads, D]; without `turns` as the mask says."""
    if turns is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    flat = [part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)]
    made = []
    for queries, keys, mask in zip(*turns[:3], strict=True):
        parts = zip(flat, (queries, keys, keys), strict=True)
        q, k, v = (_rows(rows, at).transpose(1, 2) for rows, at in parts)
        shared_heads = query.shape[1] != key.shape[1]
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scaling, enable_gqa=shared_heads)
        made.append(mixed.transpose(1, 2).flatten(0, 1))
    out = torch.cat(made).index_select(0, turns.back)
    return out.unflatten(0, (len(query), -1)), None


def _rows(rows: Tensor, at: Tensor) -> Tensor:
    """Gather rows at positions of any shape."""
    return rows.index_select(0, at.flatten()).unflatten(0, at.shape)


_known = threading.local()


@contextmanager
def known_padding(padded: bool) -> Iterator[None]:
    """Say whether rows are padded, for attention masks made in this thread meanwhile.

    Without it `sdpa_mask` reads the mask back from the device to find out.
    """
    _known.padded = padded
    try:
        yield
    finally:
        del _known.padded


def causal_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return what `sdpa_mask` does: None if causal attention says all, else who attends to whom."""
    padded = getattr(_known, "padded", None)
    skip = kwargs.get("allow_is_causal_skip", True)
    if skip and padded is False and kwargs.get("local_size") is None:
        return None
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": skip and not padded})


@contextmanager
def turned(backbone: Backbone) -> Iterator[None]:
    """Let the decoder attend by turns where it is given them; it must have been loaded with "sdpa"."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, causal_mask)
    config = backbone.decoder.config
    before = config._attn_implementation
    if before == "sdpa":
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def is_turned(backbone: Backbone) -> bool:
    return bool(backbone.decoder.config._attn_implementation == NAME)
