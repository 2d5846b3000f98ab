"""Answers in progress that share each pass, and their keys and values.

Shapes: B answers, L positions of the longest, D numbers of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from blm.backbone.generation.detokenizer import Detokenizer
from blm.types import Sampling


@dataclass(eq=False)
class Answer:
    """One answer in progress."""

    prompt: Tensor
    """[L] tokens asked with."""
    position: int
    """Where the next token stands, for the model's position code."""
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    ended: Literal["stop", "length"] | None = None
    """By the model's end token, or because there was no more room."""
    error: Exception | None = None
    """Why it could not go on."""

    def __post_init__(self) -> None:
        self.draw = torch.Generator().manual_seed(self.sampling.seed)
        self.seen: Tensor | None = None
        """[V] bool: tokens of prompt and answer, where repetition is penalised."""
        self.detokenizer: Detokenizer | None = None

    @property
    def prompt_tokens(self) -> int:
        """How many tokens it was asked with, pictures included."""
        return len(self.prompt)

    @property
    def goes_on(self) -> bool:
        return self.ended is None and self.error is None


@dataclass(frozen=True, eq=False)
class RowCache:
    """Keys and values, a row for each answer, padded on the left."""

    cache: DynamicCache
    mask: Tensor
    """[B, L], 0 at padding."""

    def select(self, rows: Sequence[int]) -> RowCache:
        """Return copies of these rows, without the padding that only others needed."""
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[index]
        longest = int(mask.sum(1).amax())
        layers = [
            (keys[:, :, -longest:][index], values[:, :, -longest:][index])
            for keys, values in _layers(self.cache)
        ]
        return RowCache(_cache_of(layers), mask[:, -longest:])

    def joined(self, other: RowCache) -> RowCache:
        """Return the rows of both, padded to the longer one."""
        length = max(self.mask.shape[1], other.mask.shape[1])

        def joined(*both: Tensor) -> Tensor:
            return torch.cat([F.pad(x, (0, 0, length - x.shape[2], 0)) for x in both])

        layers = [
            (joined(keys, more_keys), joined(values, more_values))
            for (keys, values), (more_keys, more_values) in zip(
                _layers(self.cache), _layers(other.cache), strict=True
            )
        ]
        masks = [F.pad(mask, (length - mask.shape[1], 0)) for mask in (self.mask, other.mask)]
        return RowCache(_cache_of(layers), torch.cat(masks))

    def longer(self) -> RowCache:
        """Return the same after a pass that added one position to each row."""
        return RowCache(self.cache, F.pad(self.mask, (0, 1), value=1))


@dataclass(eq=False)
class Batch:
    answers: list[Answer]
    rows: RowCache
    """One for each answer."""

    @property
    def length(self) -> int:
        """Positions of the longest."""
        return self.rows.mask.shape[1]

    def joined(self, other: Batch) -> Batch:
        return Batch(self.answers + other.answers, self.rows.joined(other.rows))

    def select(self, places: Sequence[int]) -> Batch:
        return Batch([self.answers[place] for place in places], self.rows.select(places))


def fail(answers: Sequence[Answer], error: Exception) -> None:
    """Let those that go on do so no more."""
    for answer in answers:
        if answer.goes_on:
            answer.error = error


def _layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [B, heads, L, D] of each layer."""
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers if layer.is_initialized]


def _cache_of(layers: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys[:, :, :0], values[:, :, :0], number)  # makes the layer; no copy of what it holds
        layer: Any = cache.layers[number]
        layer.keys, layer.values = keys, values
    return cache
