"""Shared test set-up: one thread a process, because the suite runs two processes on two cores."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def rng():
    """A seeded NumPy generator."""
    import numpy as np

    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def ordinary_priority() -> Iterator[None]:
    """Take back the real-time priority that SVT-AV1 gives a process of root when it encodes a video.

    Everything that this process starts later would inherit it, and starve the other tests.
    """
    yield
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
