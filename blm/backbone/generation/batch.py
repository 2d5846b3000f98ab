"""Sequences that are generated in one batch, and their key-value cache.

Shapes: B sequences, L positions of the longest, D size of an attention head, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from blm.backbone.generation.detokenizer import Detokenizer
from blm.types import Sampling


@dataclass(eq=False)
class GeneratedSequence:
    """An answer during and after its generation."""

    prompt: Tensor
    """[L] token ids of the prompt."""
    position: int
    """Position id of the next token."""
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    """Token ids generated so far."""
    ended: Literal["stop", "length"] | None = None
    """Finish reason: the model's end token, or the token limit; None while it is running."""
    error: Exception | None = None
    """The error that ended it."""

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.sampling.seed)
        self.seen: Tensor | None = None
        """[V] bool: tokens of prompt and answer, if the sampling penalises repetition."""
        self.detokenizer: Detokenizer | None = None

    @property
    def prompt_tokens(self) -> int:
        """Number of prompt tokens, placeholders of images included."""
        return len(self.prompt)

    @property
    def is_running(self) -> bool:
        """True until it has ended or failed."""
        return self.ended is None and self.error is None


@dataclass(frozen=True, eq=False)
class KeyValueCache:
    """Keys and values of a batch, one row per sequence, left-padded."""

    cache: DynamicCache
    mask: Tensor
    """[B, L], 0 at padding."""

    def select(self, rows: Sequence[int]) -> KeyValueCache:
        """Return a copy of these rows, cut to the longest of them."""
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[index]
        longest = int(mask.sum(1).amax())
        layers = [
            (keys[:, :, -longest:][index], values[:, :, -longest:][index])
            for keys, values in _layers(self.cache)
        ]
        return KeyValueCache(_cache_of(layers), mask[:, -longest:])

    @classmethod
    def join(cls, caches: Sequence[KeyValueCache]) -> KeyValueCache:
        """Return a copy of the rows of all caches, padded to the longest one."""
        length = max(one.mask.shape[1] for one in caches)

        def padded(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat([F.pad(x, (0, 0, length - x.shape[2], 0)) for x in parts])

        layers = [
            (padded([keys for keys, _ in parts]), padded([values for _, values in parts]))
            for parts in zip(*(_layers(one.cache) for one in caches), strict=True)
        ]
        masks = [F.pad(one.mask, (length - one.mask.shape[1], 0)) for one in caches]
        return cls(_cache_of(layers), torch.cat(masks))

    @property
    def nbytes(self) -> int:
        """Size of the keys and values."""
        return sum(keys.nbytes + values.nbytes for keys, values in _layers(self.cache))

    def extended(self) -> KeyValueCache:
        """Return the cache for a pass that adds one position to each row."""
        return KeyValueCache(self.cache, F.pad(self.mask, (0, 1), value=1))


@dataclass(eq=False)
class Batch:
    """Sequences that share each forward pass."""

    sequences: list[GeneratedSequence]
    cache: KeyValueCache
    """One row per sequence."""

    @property
    def length(self) -> int:
        """Number of positions of the longest sequence, prompt included."""
        return self.cache.mask.shape[1]

    def joined(self, other: Batch) -> Batch:
        """Return a batch of the sequences of both batches."""
        return Batch(self.sequences + other.sequences, KeyValueCache.join([self.cache, other.cache]))

    def select(self, rows: Sequence[int]) -> Batch:
        """Return a batch of these rows."""
        return Batch([self.sequences[row] for row in rows], self.cache.select(rows))


def cache_argument(model: nn.Module) -> str:
    """Return the name of the argument of a model's forward that takes its key-value cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def fail(sequences: Sequence[GeneratedSequence], error: Exception) -> None:
    """End the sequences that are still running with this error."""
    for sequence in sequences:
        if sequence.is_running:
            sequence.error = error


def _layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values [B, heads, L, D] of each layer."""
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers if layer.is_initialized]


def _cache_of(layers: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys[:, :, :0], values[:, :, :0], number)  # creates the layer without a copy
        layer: Any = cache.layers[number]
        layer.keys, layer.values = keys, values
    return cache
