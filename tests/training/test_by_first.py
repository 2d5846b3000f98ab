"""What process 0 does for all reaches the others, however it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from blm.training.caches import processes as module
from blm.training.caches.processes import by_first
from blm.training.loop.distributed import Processes
from blm.types import BlmError

BARRIER = threading.Barrier(2)


@dataclass(frozen=True)
class ThreadAsProcess(Processes):
    """One of two threads that stand for processes."""

    def gather_objects(self, value: Any, group: Any = None) -> list[Any]:
        return ["same", "other"]

    def wait(self) -> None:
        BARRIER.wait(timeout=10)


def run_both(folder: Path, action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what each process returned or raised."""
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)

    def run(rank: int) -> Any:
        try:
            return by_first(ThreadAsProcess(rank, 2, torch.device("cpu")), folder, action)
        except BaseException as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return [future.result(timeout=20) for future in [pool.submit(run, rank) for rank in (0, 1)]]


def fails_with(error: BaseException) -> Callable[[], Any]:
    def action() -> Any:
        raise error

    return action


def test_both_processes_get_the_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_both(tmp_path, lambda: {"rows": 3}, monkeypatch) == [{"rows": 3}] * 2
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_both_processes_raise_an_error_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_both(tmp_path, fails_with(BlmError("no such corpus")), monkeypatch)
    assert [type(error) for error in found] == [BlmError] * 2
    assert {str(error) for error in found} == {"no such corpus"}


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt(), MemoryError()])
def test_nobody_waits_for_a_process_that_died(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = run_both(tmp_path, fails_with(error), monkeypatch)
    assert first is error
    assert isinstance(second, BlmError) and "process 0 failed" in str(second)
    assert type(error).__name__ in str(second)
