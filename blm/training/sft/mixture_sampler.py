"""Mixture sampler: the examples of each step, and their packing, as a function of step and seed.

A step has a fixed number of examples, so packing and the number of ranks do not change the mixture.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np

from blm.training.sft.tokenize import TokenizedExample
from blm.types import BlmError

GOLDEN_RATIO = (5**0.5 - 1) / 2
BLOCK = 4096
"""Number of draws between two stored counts."""
ExampleIndex = tuple[int, int]
"""Number of a source, and of an example in it."""


@runtime_checkable
class MeasuredExamples(Protocol):
    """Examples whose lengths are known without reading them."""

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example."""

    @property
    def answers(self) -> np.ndarray:
        """Number of tokens with loss of each example."""


@dataclass(frozen=True, kw_only=True)
class TokenizedSource:
    """Examples of one kind, e.g. scene questions, or general replay."""

    name: str
    examples: Sequence[TokenizedExample]
    weight: float = 1.0
    """Weight in the mixture: its share is weight / sum of weights, whatever its size."""

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example."""
        if isinstance(self.examples, MeasuredExamples):
            return self.examples.lengths
        return np.array([len(example) for example in self.examples])

    @cached_property
    def answers(self) -> np.ndarray:
        """Number of tokens with loss of each example."""
        if isinstance(self.examples, MeasuredExamples):
            return self.examples.answers
        return np.array([int(example.loss_mask.sum()) for example in self.examples])

    def __post_init__(self) -> None:
        if not len(self.examples) or self.weight <= 0:
            raise BlmError(
                f"source '{self.name}' has {len(self.examples)} examples "
                f"and weight {self.weight}; leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class DrawnSource:
    """What a training draws from one source."""

    examples: int
    tokens: int
    answer_tokens: int
    """Tokens with loss."""


class MixtureSampler:
    """Draws the examples of each step, and packs them into sequences.

    Sources alternate in the order of the golden-ratio sequence (additive recurrence): after n
    examples the count of each source is within a few examples of n times its share. Each epoch of a
    source has its own order.
    """

    def __init__(
        self,
        sources: Sequence[TokenizedSource],
        *,
        examples_per_step: int,
        pack_length: int,
        seed: int,
        world_size: int = 1,
    ) -> None:
        """Raises BlmError unless each rank gets the same number of examples.

        `pack_length` [tokens]: examples share a sequence up to this length, or that of the longest
        example of the step; 0: one example per sequence. `world_size`: number of ranks.
        """
        if not sources:
            raise BlmError("there are no examples to train on")
        if examples_per_step < 1 or examples_per_step % world_size:
            raise BlmError(
                f"{examples_per_step} examples per step over {world_size} processes: "
                f"give a multiple of {world_size}"
            )
        self.sources, self.world_size, self.seed = list(sources), world_size, seed
        self.examples_per_step, self.pack_length = examples_per_step, pack_length
        weights = np.array([source.weight for source in sources])
        self.shares = weights / weights.sum()
        self._offset = np.random.default_rng(seed).random()
        self._counts_before_block = [np.zeros(len(sources), dtype=np.int64)]
        self._order = lru_cache(2 * len(sources))(self._shuffled)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._order = lru_cache(2 * len(self.sources))(self._shuffled)

    def examples(self, step: int) -> list[ExampleIndex]:
        """Return the examples of a step."""
        begin = step * self.examples_per_step
        start = begin // BLOCK * BLOCK
        order = self._source_order(start, begin + self.examples_per_step)
        counts = self._counts(begin // BLOCK)
        counts = counts + np.bincount(order[: begin - start], minlength=len(counts))
        chosen = []
        for source in order[begin - start :].tolist():
            epoch, index = divmod(int(counts[source]), len(self.sources[source].examples))
            counts[source] += 1
            chosen.append((source, int(self._order(source, epoch)[index])))
        return chosen

    def sequences(self, step: int, rank: int = 0) -> list[list[ExampleIndex]]:
        """Return the sequences of a step for one rank, as the examples in each; longest first.

        All ranks get the same number of sequences.
        """
        sequences = self._pack(self.examples(step))
        while len(sequences) % self.world_size:
            largest = max(sequences, key=len)
            half = len(largest) // 2
            sequences[sequences.index(largest)] = largest[:half]
            sequences.append(largest[half:])
        sequences.sort(key=lambda sequence: -self._tokens(sequence))
        return sequences[rank :: self.world_size]

    def length(self, index: ExampleIndex) -> int:
        """Return the number of tokens of an example."""
        source, example = index
        return int(self.sources[source].lengths[example])

    def drawn(self, steps: int) -> dict[str, DrawnSource]:
        """Return what is drawn from each source in the first steps."""
        order = self._source_order(0, steps * self.examples_per_step)
        found = {}
        for number, count in enumerate(np.bincount(order, minlength=len(self.sources)).tolist()):
            source = self.sources[number]
            epochs, rest = divmod(count, len(source.examples))
            times = np.full(len(source.examples), epochs)
            times[self._order(number, epochs)[:rest]] += 1
            found[source.name] = DrawnSource(
                examples=count, tokens=int(source.lengths @ times), answer_tokens=int(source.answers @ times)
            )
        return found

    def describe(self, steps: int) -> dict[str, float]:
        """Return means over the first steps: sequences, tokens, and examples of each source."""
        drawn = [index for step in range(steps) for index in self.examples(step)]
        counts = Counter(self.sources[source].name for source, _ in drawn)
        sequences = [one for step in range(steps) for one in self._pack(self.examples(step))]
        total = {"sequences": len(sequences), "tokens": sum(map(self._tokens, sequences))}
        total |= {f"rows of {name}": count for name, count in counts.items()}
        return {name: value / steps for name, value in total.items()}

    def _pack(self, indices: list[ExampleIndex]) -> list[list[ExampleIndex]]:
        """Pack examples with the least padding: a step is padded to its longest sequence."""
        if not self.pack_length:
            return [[index] for index in indices]
        longest = max(map(self.length, indices))
        lengths = {longest, *np.linspace(longest, max(longest, self.pack_length), 8).astype(int).tolist()}
        packings = [self._best_fit(indices, length) for length in sorted(lengths)]
        return min(packings, key=lambda packing: len(packing) * max(map(self._tokens, packing)))

    def _tokens(self, sequence: Sequence[ExampleIndex]) -> int:
        return sum(map(self.length, sequence))

    def _best_fit(self, indices: list[ExampleIndex], length: int) -> list[list[ExampleIndex]]:
        """Best-fit decreasing: the longest first, each into the fullest sequence with room."""
        sequences: list[list[ExampleIndex]] = []
        rooms: list[tuple[int, int]] = []
        for index in sorted(indices, key=self.length, reverse=True):
            needed = self.length(index)
            at = bisect_left(rooms, (needed, -1))
            room, number = rooms.pop(at) if at < len(rooms) else (length, len(sequences))
            if number == len(sequences):
                sequences.append([])
            sequences[number].append(index)
            insort(rooms, (room - needed, number))
        return sequences

    def _counts(self, block: int) -> np.ndarray:
        """Return the number of draws from each source before a block."""
        stored = self._counts_before_block
        while len(stored) <= block:
            end = len(stored) * BLOCK
            order = self._source_order(end - BLOCK, end)
            stored.append(stored[-1] + np.bincount(order, minlength=len(self.sources)))
        return stored[block]

    def _source_order(self, begin: int, end: int) -> np.ndarray:
        """Return the source of each draw from `begin` to `end`."""
        points = (self._offset + np.arange(begin, end) * GOLDEN_RATIO) % 1
        return np.searchsorted(np.cumsum(self.shares)[:-1], points, side="right")

    def _shuffled(self, source: int, epoch: int) -> np.ndarray:
        generator = np.random.default_rng((self.seed, source, epoch))
        return generator.permutation(len(self.sources[source].examples))
