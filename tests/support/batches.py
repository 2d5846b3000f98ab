"""Micro-batches for the tests of worker processes, which import them by name."""

from __future__ import annotations

import os
import signal
import time

import torch
from torch import Tensor

from blm.training.loop.batches import Microbatch
from blm.training.loop.distributed import DataShard
from blm.types import BlmError


def numbers(step: int, shard: DataShard) -> Microbatch[Tensor]:
    """Samples that are a function of the step; their order of arrival is not that of the steps."""
    time.sleep(0.05 * (step % 2))
    return Microbatch(shard.of(torch.arange(4) + 10 * step), (step,))


def killed(step: int, shard: DataShard) -> Microbatch[Tensor]:
    if step == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return numbers(step, shard)


def failing(step: int, shard: DataShard) -> Microbatch[Tensor]:
    if step == 1:
        raise BlmError("sample 'arm', frame 7 cannot be prepared: no such frame")
    if step == 2:
        raise KeyError("base")
    return numbers(step, shard)
