"""Processes as threads of one: what the collective operations of torch do, without launching any."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from blm.training.loop.distributed import Processes
from blm.types import BlmError


class Meeting:
    """The threads of a test that act as `count` processes."""

    def __init__(self, count: int) -> None:
        self.count, self.table = count, [None] * count
        self.barrier = threading.Barrier(count, timeout=60)

    def of(self, rank: int) -> Processes:
        meeting = self

        class Thread(Processes):
            def gather_objects(self, value: Any, group: Any = None) -> list[Any]:
                meeting.barrier.wait()
                meeting.table[rank] = pickle.dumps(value)
                meeting.barrier.wait()
                return [pickle.loads(one) for one in meeting.table]

            def wait(self) -> None:
                meeting.barrier.wait()

        return Thread(rank, self.count, torch.device("cpu"))


def in_processes(count: int, work: Callable[[Processes], Any]) -> list[Any]:
    """Return what `work` returns in each process, or its complaint."""
    meeting = Meeting(count)

    def run(rank: int) -> Any:
        try:
            return work(meeting.of(rank))
        except BlmError as error:
            return str(error)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
