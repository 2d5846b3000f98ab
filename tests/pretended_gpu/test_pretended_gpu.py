"""The pretended GPU itself: device mismatches, synchronisations, bit-equal results."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blm.training.loop import distributed
from tests.support.pretended_gpu import DeviceMismatchError, PretendedGpu, on_gpu, values
from tests.support.pretended_gpu.comparison import GPU, assert_same


def test_tensors_meet_only_where_cuda_lets_them(gpu: PretendedGpu) -> None:
    x, cpu, scalar = torch.ones(3, device="cuda"), torch.ones(3), torch.ones(())
    assert x.device == torch.device("cuda", 0) and x.is_cuda
    assert values(x * scalar + 2.0).tolist() == [3.0] * 3
    assert values(x[torch.tensor([0, 2])]).tolist() == [1.0] * 2
    for refused in (
        lambda: x + cpu,
        lambda: cpu.add_(x),
        lambda: scalar.clone().add_(x.sum()),
        lambda: torch.stack([x.sum(), scalar]),
        lambda: cpu[torch.tensor([0], device="cuda")],
        lambda: x.index_select(0, torch.tensor([0])),
        lambda: torch.ones(3, device=GPU) + x,
        lambda: x.to(GPU),
        lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
        lambda: nn.Linear(3, 3)(x),
    ):
        with pytest.raises(DeviceMismatchError):
            refused()
    with pytest.raises(TypeError, match="numpy"):
        np.asarray(x)


def test_waits_of_the_host_are_counted_and_located(gpu: PretendedGpu) -> None:
    x, mask = torch.ones(3, device="cuda"), torch.ones(3, device="cuda") > 0
    cpu, pinned = torch.ones(3), torch.ones(3).pin_memory()

    def kinds(block: Any) -> list[str]:
        with gpu.counting() as syncs:
            block()
        return [sync.kind for sync in syncs]

    for block in (
        lambda: x.sum().item(),
        lambda: float(x.sum()),
        lambda: bool(mask.all()),
        lambda: x.tolist(),
        lambda: x[mask],
        lambda: mask.nonzero(),
        lambda: x.masked_select(mask),
        lambda: x.cpu(),
        lambda: cpu.to("cuda"),
        lambda: cpu.to("cuda", non_blocking=True),  # from pageable memory
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: x.new_tensor([1.0]),
        lambda: x.copy_(cpu),
        lambda: x[torch.tensor([0])],
        lambda: x.repeat_interleave(x.long()),
    ):
        assert len(kinds(block)) == 1
    for block in (
        lambda: pinned.to("cuda", non_blocking=True),
        lambda: torch.full((), 2.0, device="cuda"),
        lambda: torch.arange(3, device="cuda"),
        lambda: x.masked_fill(mask, 0.0),
        lambda: x.__setitem__(mask, 0.0),
        lambda: torch.where(mask, x, 0.0),
        lambda: nn.functional.one_hot(x.long(), 3),
    ):
        assert kinds(block) == []
    with gpu.counting() as syncs:
        distributed.read_scalars({"a": x.sum()})
    assert [sync.where.split(":")[0] for sync in syncs] == ["blm/training/loop/distributed.py"]


def test_the_kernels_are_the_cpus_and_tied_weights_stay_tied(gpu: PretendedGpu) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 8), nn.LayerNorm(8), nn.Linear(8, 5))
    net[2].weight = net[0].weight
    other = on_gpu(copy.deepcopy(net), GPU)
    assert other[2].weight is other[0].weight and isinstance(other[0].weight, nn.Parameter)
    assert copy.deepcopy(other)[2].weight is not other[2].weight
    ids = torch.tensor([[1, 2, 3], [0, 1, 4]])
    for module, tokens in ((net, ids), (other, ids.to(GPU))):
        q = module(tokens)[:, None]
        masks = (None, torch.ones(3, 3, dtype=torch.bool, device=tokens.device).tril())
        mixed = [nn.functional.scaled_dot_product_attention(q, q, q, mask) for mask in masks]
        torch.stack(mixed).square().sum().backward()
    assert_same([p.grad for p in other.parameters()], [p.grad for p in net.parameters()])


def test_nothing_is_left_behind() -> None:
    before = (torch.cuda._lazy_init, torch.cuda.current_device, torch.cuda.get_rng_state)
    with PretendedGpu():
        torch.ones(1, device="cuda")
    assert before == (torch.cuda._lazy_init, torch.cuda.current_device, torch.cuda.get_rng_state)
    assert not torch.__future__.get_swap_module_params_on_conversion()
    assert type(torch.ones(1)) is Tensor and torch.ones(1).device.type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            torch.ones(1, device="cuda")
