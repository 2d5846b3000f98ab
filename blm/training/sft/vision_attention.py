"""Batched vision attention: pictures and windows of equal size in one attention call.

Qwen's vision towers hold the patches of all pictures in one sequence, cut into segments that attend
to themselves only (a frame, or a window). With "sdpa", transformers calls attention once a segment,
and reads the lengths back from the device in each block. Here the segments of one length form a
batch, and the lengths are read once a pass. Shapes: P patches, S segments of one length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, PreTrainedConfig

from blm.backbone import Backbone

NAME = "blm_segments_as_flash"
"""Transformers passes all segments and their boundaries to functions with "flash" in their name;
to others it passes one segment at a time."""
_lengths: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Boundaries of segments, the same tensor in many blocks -> lengths of the segments."""


def segment_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention within segments, of [1, heads, P, D] -> [1, P, heads, D].

    `cu_seq_lens_q` [segments + 1] are the boundaries of the segments. It has the signature of
    transformers.
    """
    assert cu_seq_lens_q is not None and attention_mask is None
    lengths = _lengths_of(cu_seq_lens_q)
    segments = [part.split(lengths, dim=2) for part in (query, key, value)]
    results = list[Tensor](segments[0])
    for length in Counter(lengths):
        own = [number for number, other in enumerate(lengths) if other == length]
        q, k, v = (torch.cat([parts[number] for number in own]) for parts in segments)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        for number, result in zip(own, mixed.split(1), strict=True):
            results[number] = result
    return torch.cat(results, dim=2).transpose(1, 2), None


def _lengths_of(boundaries: Tensor) -> list[int]:
    """Return the lengths of segments, read from the device once a tensor."""
    if boundaries not in _lengths:
        _lengths[boundaries] = boundaries.diff().tolist()
    lengths: list[int] = _lengths[boundaries]
    return lengths


@contextmanager
def use_batched_vision_attention(backbone: Backbone) -> Iterator[None]:
    """Let the vision tower use batched attention if it has segments and uses "sdpa"."""
    AttentionInterface.register(NAME, segment_attention_forward)
    configs = _configs_of_segment_attention(backbone)
    for config in configs:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation_internal = "sdpa"


def _configs_of_segment_attention(backbone: Backbone) -> list[PreTrainedConfig]:
    found = dict[int, PreTrainedConfig]()
    for module in backbone.model.modules():
        config = getattr(module, "config", None)
        takes_segments = "cu_seqlens" in signature(module.forward).parameters
        if takes_segments and config is not None and config._attn_implementation == "sdpa":
            found[id(config)] = config
    return list(found.values())
