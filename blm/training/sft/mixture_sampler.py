"""Which rows a step trains on, and how they are laid out: a pure function of the step and a seed.

Steps are counted in rows, so the mixture is the same however rows are packed and over however many ranks.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from blm.training.sft.tokenize import Row
from blm.types import BlmError

GOLDEN, BLOCK = (5**0.5 - 1) / 2, 4096
Place = tuple[int, int]
"""Source, row."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows of one kind, e.g. scene questions, or general replay."""

    name: str
    rows: Sequence[Row]
    weight: float = 1.0
    """Its share of all rows trained on is weight / sum of weights, whatever the number of its rows."""

    def __post_init__(self) -> None:
        if not self.rows or self.weight <= 0:
            raise BlmError(
                f"source '{self.name}' has {len(self.rows)} rows and weight {self.weight}; leave it out"
            )


class MixtureSampler:
    """Picks rows for each step and packs them.

    Sources take turns in the order of the golden-ratio sequence: after n rows the count of each is within a
    few rows of n times its share. A source is shuffled anew each time it has been gone through.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        rows_per_step: int,
        pack_length: int,
        seed: int,
        world: int = 1,
    ) -> None:
        """`pack_length` [tokens]: rows may share a sequence up to this, or the longest row of the step; 0:
        one row a sequence. `world`: ranks.

        Raises BlmError unless each rank gets the same number of rows.
        """
        if not sources:
            raise BlmError("no rows to train on")
        if rows_per_step < 1 or rows_per_step % world:
            raise BlmError(f"{rows_per_step} rows a step over {world} processes: give a multiple of {world}")
        self.sources, self.world, self.seed = list(sources), world, seed
        self.rows_per_step, self.pack_length = rows_per_step, pack_length
        weights = np.array([source.weight for source in sources])
        self.shares = weights / weights.sum()
        self._first = np.random.default_rng(seed).random()
        self._before = [np.zeros(len(sources), dtype=np.int64)]
        self._order = lru_cache(2 * len(sources))(self._shuffled)

    def rows(self, step: int) -> list[Place]:
        """Return the rows of a step."""
        begin = step * self.rows_per_step
        counts, start = self._counts(begin // BLOCK), begin // BLOCK * BLOCK
        turns = self._turns(start, begin + self.rows_per_step)
        counts = counts + np.bincount(turns[: begin - start], minlength=len(counts))
        places = []
        for source in turns[begin - start :].tolist():
            epoch, at = divmod(int(counts[source]), len(self.sources[source].rows))
            counts[source] += 1
            places.append((source, int(self._order(source, epoch)[at])))
        return places

    def groups(self, step: int, rank: int = 0) -> list[list[Place]]:
        """Return the rows of a step that share a sequence, for each sequence of a rank; longest first.

        All ranks get the same number of sequences.
        """
        groups = self._packed(self.rows(step))
        while len(groups) % self.world:
            largest = max(groups, key=len)
            half = len(largest) // 2
            groups[groups.index(largest)] = largest[:half]
            groups.append(largest[half:])
        groups.sort(key=lambda group: -sum(map(self.length, group)))
        return groups[rank :: self.world]

    def length(self, place: Place) -> int:
        """Tokens of a row."""
        source, row = place
        return len(self.sources[source].rows[row])

    def describe(self, steps: int) -> dict[str, float]:
        """Return means over the first steps: sequences and tokens a step, and the rows of each source."""
        picked = [place for step in range(steps) for place in self.rows(step)]
        rows = Counter(self.sources[source].name for source, _ in picked)
        groups = [group for step in range(steps) for group in self._packed(self.rows(step))]
        tokens = sum(self.length(place) for group in groups for place in group)
        total = {"sequences": len(groups), "tokens": tokens} | {f"rows of {n}": c for n, c in rows.items()}
        return {name: value / steps for name, value in total.items()}

    def _packed(self, places: list[Place]) -> list[list[Place]]:
        """Pack rows up to the length that wastes least: all sequences of a step are padded to the longest."""
        if not self.pack_length:
            return [[place] for place in places]
        longest = max(map(self.length, places))
        lengths = {longest, *np.linspace(longest, max(longest, self.pack_length), 8).astype(int).tolist()}
        packings = [(self._best_fit(places, length), length) for length in sorted(lengths)]
        return min(packings, key=lambda made: len(made[0]) * max(map(self._tokens, made[0])))[0]

    def _tokens(self, group: Sequence[Place]) -> int:
        return sum(map(self.length, group))

    def _best_fit(self, places: list[Place], length: int) -> list[list[Place]]:
        """Pack the longest first, each into the fullest sequence that still has room."""
        groups: list[list[Place]] = []
        rooms: list[tuple[int, int]] = []
        for place in sorted(places, key=self.length, reverse=True):
            needed = self.length(place)
            at = bisect_left(rooms, (needed, -1))
            room, number = rooms.pop(at) if at < len(rooms) else (length, len(groups))
            if number == len(groups):
                groups.append([])
            groups[number].append(place)
            insort(rooms, (room - needed, number))
        return groups

    def _counts(self, block: int) -> np.ndarray:
        """Rows of each source before a block of places."""
        while len(self._before) <= block:
            end = len(self._before) * BLOCK
            turns = self._turns(end - BLOCK, end)
            self._before.append(self._before[-1] + np.bincount(turns, minlength=len(self.sources)))
        return self._before[block]

    def _turns(self, begin: int, end: int) -> np.ndarray:
        """Source of each place from `begin` to `end`."""
        points = (self._first + np.arange(begin, end) * GOLDEN) % 1
        return np.searchsorted(np.cumsum(self.shares)[:-1], points, side="right")

    def _shuffled(self, source: int, epoch: int) -> np.ndarray:
        generator = np.random.default_rng((self.seed, source, epoch))
        return generator.permutation(len(self.sources[source].rows))
