"""Batches that worker processes make: order, errors, death, Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from blm.training.loop.batches import ByWorkers, open_batches
from blm.training.loop.distributed import DataShard
from blm.types import BlmError
from tests.support.batches import failing, killed, numbers

PARTS = [DataShard(0, 2), DataShard(1, 2)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_the_order_of_steps_and_parts(workers: int) -> None:
    before = torch.random.get_rng_state()
    with open_batches(ByWorkers(numbers, workers), range(3, 6), PARTS) as batches:
        found = [[one.batch.tolist() for one in step] for step, seconds in batches if seconds >= 0]
    assert found == [[[10 * n, 10 * n + 2], [10 * n + 1, 10 * n + 3]] for n in (3, 4, 5)]
    assert torch.equal(torch.random.get_rng_state(), before), "dropout draws from this generator"
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_is_reported() -> None:
    with (
        pytest.raises(BlmError, match=r"a worker process that .* ended: .* fewer workers"),
        open_batches(ByWorkers(killed, 1), range(4), PARTS) as batches,
    ):
        list(batches)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (1, "^the batch of step 1 cannot be made: sample 'arm', frame 7 cannot be prepared: no such frame"),
        (2, "^the batch of step 2 cannot be made: KeyError: 'base'"),
    ],
)
def test_an_error_in_a_worker_names_step_and_sample(first: int, message: str) -> None:
    with (
        pytest.raises(BlmError, match=message) as caught,
        open_batches(ByWorkers(failing, 1), range(first, 4), PARTS) as batches,
    ):
        list(batches)
    assert "in failing" in caught.value.__notes__[0]


SCRIPT = """
import multiprocessing, time
from blm.training.loop.batches import ByWorkers, open_batches
from blm.training.loop.distributed import DataShard
from tests.support.batches import numbers

if __name__ == "__main__":
    with open_batches(ByWorkers(numbers, 2), range(10**6), [DataShard()]) as batches:
        for _ in batches:
            print(*(one.pid for one in multiprocessing.active_children()), flush=True)
            time.sleep(60)
"""


def _alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().split()[2] != "Z"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_training_process(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        children = [int(pid) for pid in process.stdout.readline().split()]
        assert len(children) == 2
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does
        else:
            process.kill()
        errors = process.stderr.read()
    assert errors.count("Traceback") <= 1, errors
    deadline = time.monotonic() + 30
    while any(map(_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_alive, children))
