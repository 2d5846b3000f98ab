"""Two processes (gloo) with small networks: sharded checkpoints, precisions of weights, unused parameters.

This file is also what `accelerate launch` runs in each process.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blm.training.loop import state
from blm.training.loop.batches import Microbatch
from blm.training.loop.distributed import DataShard
from blm.training.loop.ema import Ema
from blm.training.loop.loop import LoopConfig, run_loop
from blm.training.loop.state import checkpoints
from blm.types import BlmError

CONFIG = LoopConfig(steps=4, batch_size=8, lr=1e-2, log_every=1, save_every=2, keep=2)
LAUNCH = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
RUNS = {
    "ddp": CONFIG,
    "ddp-parts": replace(CONFIG, accumulate=2),
    "fsdp2": replace(CONFIG, shard=True),
    "fsdp2-bfloat16": replace(CONFIG, shard=True, precision="bfloat16"),
}
seen: set[torch.dtype] = set()
"""Precisions of the trained weights of blocks in the forward passes of this process."""


class Adapted(nn.Module):
    """A unit of FSDP: frozen bfloat16 weights beside trained float32 ones, of 5 rows (3 and 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(5, 5).to(torch.bfloat16).requires_grad_(False)
        self.trained = nn.Linear(5, 5)
        self.register_buffer("scale", torch.full((5,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        seen.add(self.trained.weight.dtype)
        assert self.frozen.weight.dtype is torch.bfloat16 and self.scale.dtype is torch.float32
        return x + self.scale * torch.tanh(self.frozen(x.bfloat16()) + self.trained(x))


class Net(nn.Module):
    _no_split_modules = ("Adapted",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.blocks = nn.Linear(3, 5), nn.ModuleList(Adapted() for _ in range(2))
        self.head, self.unused = nn.Linear(5, 1), nn.Linear(2, 2)

    def loss(self, x: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = block(hidden)
        assert x.dtype is torch.float32  # also the targets
        return (self.head(hidden).squeeze(-1) - x.sum(-1)).square().mean(), {}


def points(step: int, shard: DataShard) -> Microbatch[Tensor]:
    x = torch.from_numpy(np.random.default_rng(step).normal(size=(8, 3)).astype(np.float32))
    return Microbatch(shard.of(x), (step,), weight=len(shard.of(x)))


def train(out: Path, config: LoopConfig) -> Net:
    net = Net()
    run_loop(net, net.loss, points, config, out, ema=Ema(net, 0.9))
    save_file(net.state_dict(), out / "net.safetensors")
    return net


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def work(out: Path) -> None:
    processes = PartialState(cpu=True)
    for name, config in RUNS.items():
        seen.clear()
        net = train(out / name, config)
        bf16 = name == "fsdp2-bfloat16"
        assert seen == {torch.bfloat16 if bf16 else torch.float32}, (name, seen)
        assert type(net) is Net and not hasattr(net.head.weight, "full_tensor")
    fail_at_the_last_checkpoint(out / "cut", RUNS["fsdp2"], processes)
    if processes.is_main_process:
        for name in ("resharded", "lost"):
            shutil.copytree(out / "cut", out / name)
    processes.wait_for_everyone()
    train(out / "cut", RUNS["fsdp2"])
    processes.wait_for_everyone()
    processes.destroy_process_group()


def fail_at_the_last_checkpoint(out: Path, config: LoopConfig, processes: PartialState) -> None:
    """Process 0 cannot write its file, after process 1 wrote its own: as if all were killed there."""

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if processes.is_main_process and json.loads(metadata["run"])["done"] == config.steps:
            raise OSError(28, "no space left on device")
        save_file(tensors, path, metadata)

    state.save_file = full
    with pytest.raises(BlmError, match=r"process 0 of 2 wrote no checkpoint: .*no space left"):
        train(out, config)
    state.save_file = save_file


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of runs of two processes."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH.split()]
    command += ["--main_process_port", str(port), __file__, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return out


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_like_one(two: Path, tmp_path: Path, name: str) -> None:
    """Also with a layer that no batch uses, and frozen bfloat16 weights beside trained ones."""
    alone = train(tmp_path, replace(RUNS[name], shard=False))
    exact = "bfloat16" not in name
    assert losses(two / name) == pytest.approx(losses(tmp_path), rel=1e-5 if exact else 0.02)
    for key, value in load_file(two / name / "net.safetensors").items():
        expected = alone.state_dict()[key]
        assert value.dtype is expected.dtype and value.shape == expected.shape, key
        assert torch.allclose(value, expected, atol=1e-4 if exact else CONFIG.lr), key


def test_each_process_writes_its_rows(two: Path) -> None:
    main = checkpoints(two / "fsdp2")[-1]
    part = main.with_suffix(".part-1.safetensors")
    with safe_open(main, "pt") as first, safe_open(part, "pt") as second:
        shards = json.loads(first.metadata()["run"])["shards"]
        assert shards["weight/blocks.0.trained.weight"] == [0, 3, 5]
        assert set(second.keys()) == shards.keys() and "moment/head.weight/exp_avg" in shards
        whole = load_file(two / "fsdp2/net.safetensors")
        for name in (name for name in shards if name.startswith("weight/")):
            rows = torch.cat([first.get_tensor(name), second.get_tensor(name)])
            assert torch.equal(rows, whole[name.removeprefix("weight/")]), name
        assert not [name for name in set(first.keys()) if "frozen" in name and not name.startswith("ema/")]


def test_a_run_cut_while_it_wrote_goes_on_to_the_same_bits(two: Path) -> None:
    one, other = (load_file(two / name / "net.safetensors") for name in ("fsdp2", "cut"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_one_process_goes_on_with_the_shards_of_two(two: Path) -> None:
    out = two / "resharded"
    stale = out / "state-00000004.part-1.safetensors"
    assert [file.name for file in checkpoints(out)] == ["state-00000002.safetensors"] and stale.exists()
    net = train(out, CONFIG)
    for name, value in load_file(two / "fsdp2/net.safetensors").items():
        assert torch.allclose(net.state_dict()[name], value, atol=1e-4), name
    train(out, replace(CONFIG, keep=1))
    assert len(checkpoints(out)) == 2  # a finished run writes nothing


def test_a_lost_part_is_named(two: Path) -> None:
    (two / "lost/state-00000002.part-1.safetensors").unlink()
    with pytest.raises(BlmError, match=r"part-1.safetensors' is missing: .*state-00000002.safetensors"):
        train(two / "lost", CONFIG)


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
