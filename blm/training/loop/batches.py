"""Micro-batches of the training loop, and the thread or worker processes that prepare them."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.pin_memory import pin_memory

from blm.jobs.local import exit_with_parent
from blm.jobs.unit import ONE_THREAD, environment_variables
from blm.training.loop.distributed import DataShard
from blm.types import BlmError

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

    def pin_memory(self) -> Microbatch[B]:
        """Return a copy whose batch is in pinned memory: copying it to a GPU does not block.

        As in torch's DataLoader, tensors in containers are pinned, and objects by their own
        `pin_memory`.
        """
        return replace(self, batch=pin_memory(self.batch))


MakeBatch = Callable[[int, DataShard], Microbatch[B]]
"""(step, data shard) -> its micro-batch."""


@dataclass(frozen=True)
class ByWorkers(Generic[B]):
    """Makes batches in worker processes, or with 0 workers in a thread of this process.

    `make` is sent to the workers, so it must be picklable; it depends on its arguments alone, so the
    batches are the same with any number of workers.
    """

    make: MakeBatch[B]
    workers: int

    def __call__(self, step: int, shard: DataShard) -> Microbatch[B]:
        return self.make(step, shard)


@contextmanager
def open_batches(
    next_batch: MakeBatch[B], steps: range, shards: Sequence[DataShard], *, pin: bool = False
) -> Iterator[Iterator[tuple[list[Microbatch[B]], float]]]:
    """Give an iterator over the micro-batches of each step and the seconds spent waiting for them.

    A thread prepares one step ahead; the worker processes of `ByWorkers` prepare two micro-batches
    ahead each, and end with the context. With `pin`, batches are in pinned memory. Inside the
    context, a worker that dies raises BlmError, and so does an error in a worker.
    """
    if not isinstance(next_batch, ByWorkers) or next_batch.workers == 0:
        with closing(prefetch(next_batch, steps, shards, pin=pin)) as batches:
            yield batches
        return
    context: Any = torch.multiprocessing.get_context("forkserver")  # it imports the modules once for all
    context.set_forkserver_preload([next_batch.make.__module__])
    loader = DataLoader[Any](
        _Steps(next_batch.make),
        batch_size=None,
        sampler=[(step, shard) for step in steps for shard in shards],
        num_workers=next_batch.workers,
        pin_memory=pin,
        worker_init_fn=_set_up_worker,
        multiprocessing_context=context,
        generator=torch.Generator(),  # by default it would draw from the global one, as dropout does
    )
    with environment_variables(ONE_THREAD):
        loaded: Any = iter(loader)
    try:
        yield _loaded_steps(loaded, steps, len(shards))
    finally:
        loaded._shutdown_workers()


def prefetch(
    next_batch: MakeBatch[B], steps: range, shards: Sequence[DataShard], *, pin: bool = False
) -> Generator[tuple[list[Microbatch[B]], float], None, None]:
    """Yield the micro-batches of each step, and the seconds spent waiting for them.

    A thread prepares one step ahead.
    """

    def make(step: int) -> list[Microbatch[B]]:
        made = (next_batch(step, shard) for shard in shards)
        return [microbatch.pin_memory() if pin else microbatch for microbatch in made]

    with ThreadPoolExecutor(1, "batches") as pool:
        pending = [pool.submit(make, step) for step in steps[:1]]
        for step in steps:
            begin = time.perf_counter()
            microbatches = pending.pop().result()
            pending = [pool.submit(make, step + 1)] if step + 1 in steps else []
            yield microbatches, time.perf_counter() - begin


@dataclass(frozen=True)
class _Failure:
    """An error in a worker; torch would wrap a BlmError in the text of a traceback."""

    message: str
    trace: str


class _Steps(Dataset[Any]):
    """The micro-batches of a run, as the data set that torch's DataLoader reads in its workers."""

    def __init__(self, make: MakeBatch[Any]) -> None:
        self.make = make

    def __getitem__(self, key: tuple[int, DataShard]) -> Microbatch[Any] | _Failure:
        try:
            return self.make(*key)
        except Exception as error:
            message = str(error) if isinstance(error, BlmError) else f"{type(error).__name__}: {error}"
            return _Failure(message, traceback.format_exc())


def _loaded_steps(
    loaded: Iterator[Microbatch[B] | _Failure], steps: range, parts: int
) -> Iterator[tuple[list[Microbatch[B]], float]]:
    for step in steps:
        begin = time.perf_counter()
        microbatches = list[Microbatch[B]]()
        for _ in range(parts):
            made = _next(loaded)
            if isinstance(made, _Failure):
                error = BlmError(f"the batch of step {step} cannot be made: {made.message}")
                error.add_note(made.trace)
                raise error
            microbatches.append(made)
        yield microbatches, time.perf_counter() - begin


def _next(loaded: Iterator[Microbatch[B] | _Failure]) -> Microbatch[B] | _Failure:
    """Return the next micro-batch. Raises BlmError if a worker has died, also while it sent one."""
    try:
        return next(loaded)
    except (RuntimeError, OSError, EOFError) as error:
        raise BlmError(
            f"a worker process that prepares batches ended: {' '.join(str(error).split())}. Check memory and "
            "shared memory (/dev/shm), or use fewer workers; the same command resumes the run"
        ) from error


def _set_up_worker(number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training process handles Ctrl-C and ends its workers
    # torch's own watch is on the fork server, which lives as long as its workers
    threading.Thread(target=exit_with_parent, daemon=True).start()
