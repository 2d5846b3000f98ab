"""Devices keep their index, as in cuda:3."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from blm.app.model import check_device
from blm.baselines.diffusion_policy import DiffusionPolicy
from blm.training.loop import distributed
from blm.training.loop.distributed import Processes
from blm.types import BlmError
from tests.support.pretended_gpu import PretendedGpu, on_gpu
from tests.support.pretended_gpu.comparison import GPU


@pytest.mark.parametrize("count", [1, 4])
def test_a_process_alone_keeps_its_device_and_one_of_several_gets_its_own(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    asked = []

    def state(cpu: bool) -> Any:
        asked.append(cpu)
        return SimpleNamespace(process_index=count - 1, num_processes=count, device=torch.device("cuda", 1))

    monkeypatch.setattr(distributed, "PartialState", state)
    for name in (GPU, torch.device(GPU)) if count == 1 else ("cuda", "cuda:1"):  # others are refused
        assert Processes.join(name).device == torch.device(GPU if count == 1 else "cuda:1")
    assert Processes.join("cpu").device == torch.device("cpu")
    assert asked == [False, False, True]


def test_a_device_is_checked_by_kind_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_device(GPU)
    for name in ("cuda:4", "gpu", "cuda:x"):
        with pytest.raises(BlmError, match="cannot be used"):
            check_device(name)


def test_a_policy_names_its_device_in_full(gpu: PretendedGpu) -> None:
    network = on_gpu(nn.Linear(2, 2), GPU)
    assert DiffusionPolicy.device.fget(SimpleNamespace(network=network)) == GPU  # type: ignore[attr-defined]
