"""Micro-batches of the training loop, and a thread that prepares those of the next step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from torch.utils.data._utils.pin_memory import pin_memory

from blm.training.loop.distributed import DataShard

B = TypeVar("B")


@dataclass(frozen=True)
class Microbatch(Generic[B]):
    """The samples of one forward and backward pass of one process."""

    batch: B
    """The argument of the loss function."""
    ids: Sequence[object]
    """Names of its samples, for error messages and `samples_per_s`."""
    weight: float = 1.0
    """Number of terms (answer tokens, or samples) that its mean loss averages."""
    tokens: int = 0
    """Number of tokens without padding, for `tokens_per_s`."""
    positions: int = 0
    """Number of tokens with padding, for `padding_share`."""


def with_pinned_memory(
    next_batch: Callable[[int, DataShard], Microbatch[B]],
) -> Callable[[int, DataShard], Microbatch[B]]:
    """Return `next_batch` with its batches in pinned memory: copying them to a GPU does not block.

    As in torch's DataLoader, tensors in containers are pinned, and objects by their own
    `pin_memory`.
    """

    def make(step: int, shard: DataShard) -> Microbatch[B]:
        microbatch = next_batch(step, shard)
        return replace(microbatch, batch=pin_memory(microbatch.batch))

    return make


def prefetch(
    next_batch: Callable[[int, DataShard], Microbatch[B]], steps: range, shards: Sequence[DataShard]
) -> Iterator[tuple[list[Microbatch[B]], float]]:
    """Yield the micro-batches of each step, and the seconds spent waiting for them.

    A thread prepares one step ahead.
    """

    def make(step: int) -> list[Microbatch[B]]:
        return [next_batch(step, shard) for shard in shards]

    with ThreadPoolExecutor(1, "batches") as pool:
        pending = [pool.submit(make, step) for step in steps[:1]]
        for step in steps:
            begin = time.perf_counter()
            microbatches = pending.pop().result()
            pending = [pool.submit(make, step + 1)] if step + 1 in steps else []
            yield microbatches, time.perf_counter() - begin
