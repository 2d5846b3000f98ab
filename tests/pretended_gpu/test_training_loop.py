"""The training loop on a pretended GPU: the steps of the CPU, one synchronisation each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from blm.training.loop.batches import Microbatch
from blm.training.loop.distributed import DataShard
from blm.training.loop.ema import Ema
from blm.training.loop.loop import LoopConfig, run_loop
from blm.training.loop.state import checkpoints
from blm.types import BlmError
from tests.support.pretended_gpu import PretendedGpu, on_gpu, table, values
from tests.support.pretended_gpu.comparison import GPU, assert_same, log_rows


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(3, 8), nn.Linear(8, 8)])  # named as blocks are, for Muon
        self.norm, self.unused = nn.BatchNorm1d(8), nn.Linear(2, 2)

    def loss(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        x, factor = (part.to(self.norm.weight.device, non_blocking=True) for part in batch)
        out = self.norm(self.layers[1](nn.functional.dropout(self.layers[0](x), 0.5)))
        loss = (out.mean(-1) - x.sum(-1)).square().mean() * factor.mean()
        return loss, {"twice": 2 * loss.detach(), "rows": float(len(x)), "right": (out > 0).sum()}


def points(step: int, shard: DataShard, factor: float = 1.0) -> Microbatch[tuple[Tensor, ...]]:
    x = shard.of(torch.from_numpy(np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)))
    return Microbatch((x, torch.full((1,), factor)), (step,), weight=len(x), tokens=5 * len(x), positions=40)


@pytest.mark.parametrize("muon", [0.0, 0.02])
def test_the_loop_makes_the_steps_of_the_cpu_and_waits_once_in_each(
    gpu: PretendedGpu, tmp_path: Path, muon: float
) -> None:
    if muon and not hasattr(torch.optim, "Muon"):
        pytest.skip("Muon needs torch 2.9")
    config = LoopConfig(
        steps=5, batch_size=4, lr=1e-2, muon=muon, clip=0.5, accumulate=2, log_every=1, save_every=3
    )
    weights, logs = {}, {}
    for name in ("cpu", GPU):
        module = Net()
        module = on_gpu(module, name) if name != "cpu" else module
        ema = Ema(module, 0.9)
        with gpu.training_steps() as steps:
            run_loop(module, module.loss, points, config, tmp_path / name, ema=ema)
        weights[name] = [*module.state_dict().values(), *ema.module.state_dict().values()]
        logs[name] = log_rows(tmp_path / name)
    assert_same(weights[GPU], weights["cpu"])
    assert logs[GPU] == logs["cpu"] and len(logs["cpu"]) == 5
    assert {"loss", "twice", "rows", "right", "grad_norm", "tokens_per_s"} <= logs["cpu"][0].keys()
    of_checkpoints = [len([s for s in step if "/state.py" not in s.where]) for step in steps]
    assert of_checkpoints == [1] * 4, table(steps[0])
    assert all("/state.py" not in s.where for step in steps for s in step)  # checkpoints wait in a thread
    saved = {name: load_file(checkpoints(tmp_path / name)[-1]) for name in ("cpu", GPU)}
    for name, value in saved["cpu"].items():
        assert torch.equal(saved[GPU][name], value), name


def test_a_gpu_without_bfloat16_is_refused_before_anything_is_written(
    gpu: PretendedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blm.backbone.precision._supports_bfloat16", lambda device: False)
    module, config = on_gpu(Net(), GPU), LoopConfig(steps=1, batch_size=4)
    with pytest.raises(BlmError, match=rf"'{GPU}' does not support bfloat16; give --loop.precision float32"):
        run_loop(module, module.loss, points, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run_loop(module, module.loss, points, replace(config, precision="float32"), tmp_path / "run")


def test_a_step_that_is_not_finite_ends_before_the_weights_are_touched(
    gpu: PretendedGpu, tmp_path: Path
) -> None:
    module = on_gpu(Net(), GPU)
    before = [values(p).clone() for p in module.parameters()]
    config = LoopConfig(steps=5, batch_size=4)
    with pytest.raises(BlmError, match=r"loss nan.* at step 0, samples \[0\]"):
        run_loop(module, module.loss, lambda step, shard: points(step, shard, np.nan), config, tmp_path)
    assert all(torch.equal(values(p), old) for p, old in zip(module.parameters(), before, strict=True))
