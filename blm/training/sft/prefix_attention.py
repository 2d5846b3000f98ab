"""Prefix attention: turns attend to a shared prefix and to themselves, not to each other.

A dense mask gives the same result, but its cost grows with the square of the sequence length. Here
the queries of a turn meet only the keys that they attend to: positions are gathered into blocks of
similar length, attended, and scattered back. It is an attention function of transformers
(AttentionInterface), so any decoder of transformers can use it.
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
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from blm.backbone import Backbone

NAME = "blm_prefix_attention"
ATTENTION_CALL_COST = 2**14
"""Assumed overhead of one attention call, in products of a query and a key. It determines how many
lengths blocks are padded to; results do not depend on it."""
AttentionBlock = tuple[np.ndarray, np.ndarray]
"""Positions of a turn (or of a prefix), and positions of the prefix that it attends to."""


class PrefixAttentionLayout(NamedTuple):
    """Which positions attend to which, in buckets of N blocks.

    It is a tuple, because FSDP only finds tensors in tuples.
    """

    queries: tuple[Tensor, ...]
    """[N, Q] each: positions in the flattened batch; a short block repeats its last position."""
    keys: tuple[Tensor, ...]
    """[N, K] each."""
    masks: tuple[Tensor, ...]
    """[N, 1, Q, K] each, True where attended."""
    scatter: Tensor
    """[G * L]: index of each position's result among those of all blocks; arbitrary at padding."""

    def to(self, device: torch.device) -> PrefixAttentionLayout:
        """Return a copy on a device; copying from pinned memory does not block the host."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PrefixAttentionLayout:
        """Return a copy in pinned (page-locked) memory."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> PrefixAttentionLayout:
        queries, keys, masks = (tuple(map(change, parts)) for parts in self[:3])
        return PrefixAttentionLayout(queries, keys, masks, change(self.scatter))


def prefix_attention_layout(example_ids: np.ndarray, segment_ids: np.ndarray) -> PrefixAttentionLayout:
    """Return the layout of sequences [G, L].

    `example_ids` number the examples of each sequence, -1 is padding; `segment_ids` as in
    TokenizedExample.
    """
    length, no_prefix = example_ids.shape[1], np.zeros(0, dtype=np.int64)
    blocks: list[AttentionBlock] = []
    for row, (examples, segments) in enumerate(zip(example_ids, segment_ids, strict=True)):
        for number in range(int(examples.max()) + 1):
            index = np.flatnonzero(examples == number)
            segment = segments[index]
            position = index + row * length
            prefix = position[segment == 0]
            blocks += [(prefix, no_prefix)] if len(prefix) else []
            blocks += [(position[segment == turn], prefix) for turn in range(1, int(segment.max()) + 1)]
    blocks.sort(key=lambda block: len(block[0]))
    scatter, count = np.zeros(example_ids.size, dtype=np.int64), 0
    buckets: list[tuple[Tensor, Tensor, Tensor]] = []
    for bucket in _buckets(blocks):
        buckets.append(tuple(map(torch.from_numpy, _padded(bucket))))  # type: ignore[arg-type]
        width = buckets[-1][0].shape[1]
        for own, _ in bucket:
            scatter[own] = count + np.arange(len(own))
            count += width
    queries, keys, masks = zip(*buckets, strict=True)
    return PrefixAttentionLayout(queries, keys, masks, torch.from_numpy(scatter))


def _buckets(blocks: list[AttentionBlock]) -> list[list[AttentionBlock]]:
    """Split sorted blocks into buckets of minimal total padding and call overhead.

    Dynamic programming over the end of the last bucket.
    """
    own, shared = (np.array([len(block[side]) for block in blocks]) for side in (0, 1))
    best, begins = np.zeros(len(blocks) + 1), np.zeros(len(blocks) + 1, dtype=np.int64)
    for end in range(1, len(blocks) + 1):
        key_length = np.maximum.accumulate(shared[:end][::-1])[::-1] + own[end - 1]
        costs = best[:end] + ATTENTION_CALL_COST + np.arange(end, 0, -1) * own[end - 1] * key_length
        begins[end] = costs.argmin()
        best[end] = costs.min()
    buckets, end = [], len(blocks)
    while end:
        buckets.append(blocks[begins[end] : end])
        end = int(begins[end])
    return buckets[::-1]


def _padded(bucket: list[AttentionBlock]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return queries [N, Q], keys [N, S + Q] and mask [N, 1, Q, S + Q] of padded blocks."""
    count = len(bucket)
    turn_length, prefix_length = (max(len(block[side]) for block in bucket) for side in (0, 1))
    queries = np.stack([np.pad(own, (0, turn_length - len(own)), mode="edge") for own, _ in bucket])
    prefixes = np.stack([np.pad(prefix, (0, prefix_length - len(prefix))) for _, prefix in bucket])
    is_prefix = np.arange(prefix_length) < np.array([len(prefix) for _, prefix in bucket])[:, None]
    causal = np.broadcast_to(np.tri(turn_length, dtype=bool), (count, turn_length, turn_length))
    prefix_mask = np.broadcast_to(is_prefix[:, None], (count, turn_length, prefix_length))
    keys = np.concatenate([prefixes, queries], axis=1)
    return queries, keys, np.concatenate([prefix_mask, causal], axis=2)[:, None]


def prefix_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    prefix_layout: PrefixAttentionLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention of [G, heads, L, D] -> [G, L, heads, D].

    It has the signature of transformers. Without `prefix_layout` it is ordinary attention under
    `attention_mask`.
    """
    if prefix_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    flat = [part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    repeated = groups > 1 and repeats_heads(query.device)
    results = []
    for queries, keys, mask in zip(*prefix_layout[:3], strict=True):
        parts = zip(flat, (queries, keys, keys), strict=True)
        q, k, v = (_gather(values, positions).transpose(1, 2) for values, positions in parts)
        if repeated:
            k, v = repeat_kv(k, groups), repeat_kv(v, groups)
        grouped = groups > 1 and not repeated
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scaling, enable_gqa=grouped)
        results.append(mixed.transpose(1, 2).flatten(0, 1))
    out = torch.cat(results).index_select(0, prefix_layout.scatter)
    return out.unflatten(0, (len(query), -1)), None


def repeats_heads(device: torch.device) -> bool:
    """Return whether to repeat the heads of keys and values for grouped queries under a mask.

    On CUDA, a mask together with `enable_gqa` leaves only the slow kernel that stores all attention
    weights. On a CPU, repeating gives the same values, but takes longer.
    """
    return device.type == "cuda"


def _gather(values: Tensor, positions: Tensor) -> Tensor:
    """Gather rows of `values` [P, ...] at positions of any shape."""
    return values.index_select(0, positions.flatten()).unflatten(0, positions.shape)


_padding = threading.local()


@contextmanager
def known_padding(padded: bool) -> Iterator[None]:
    """Declare whether sequences are padded, for attention masks that this thread makes meanwhile.

    Without it `sdpa_mask` reads the padding mask back from the device to find out.
    """
    _padding.padded = padded
    try:
        yield
    finally:
        del _padding.padded


def sdpa_mask_without_sync(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return the attention mask of `sdpa_mask`; None if causal attention needs no mask.

    It respects `known_padding`.
    """
    padded = getattr(_padding, "padded", None)
    skip = kwargs.get("allow_is_causal_skip", True)
    if skip and padded is False and kwargs.get("local_size") is None:
        return None
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": skip and not padded})


@contextmanager
def use_prefix_attention(backbone: Backbone) -> Iterator[None]:
    """Let the decoder use prefix attention for calls with a layout, if it uses "sdpa"."""
    AttentionInterface.register(NAME, prefix_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask_without_sync)
    config = backbone.decoder.config
    before = config._attn_implementation
    if before == "sdpa":
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def uses_prefix_attention(backbone: Backbone) -> bool:
    """Return whether `use_prefix_attention` is in effect."""
    return bool(backbone.decoder.config._attn_implementation == NAME)
