"""Two processes (gloo) train as one does: DDP, FSDP2, and going on from each other's checkpoints.

This file is also what `accelerate launch` runs in each process.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

from blm.backbone import build_nano
from blm.policy.network import PolicyConfig
from blm.training.loop.loop import LoopConfig
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.policy.train import train_stage2
from blm.training.sft import loss
from blm.training.sft.lora import Lora
from blm.training.sft.train import Stage1Config, TrainingSource, train_stage1
from blm.types import Image, Message
from tests.support.backbones import tiny_qwen
from tests.support.hidden_states import make_backbone, make_dataset
from tests.support.launch import launch
from tests.support.policy_training import POLICY

TEXTS = ["How many cubes are there?", "two", "Hello.", "Good day to you, robot."]
STEPS, ROWS = 4, 4
NO_FUTURE = replace(POLICY, future_weight=0.0)
"""The head of the future-prediction loss is used by no batch."""
RATE = 2e-5
"""Of Stage I. Copying heads are sharp: at larger ones a step enlarges rounding above what is compared."""
MODELS = {"nano": lambda: build_nano(TEXTS), "qwen3": lambda: tiny_qwen("3")}
"""The eye of Qwen3-VL is sharded by block: a process that did not run it would leave the other waiting."""


def sources() -> list[TrainingSource]:
    """About one row in four has a picture: with two processes, one of them often has rows of text only."""
    pixels = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    seen = (Message("user", (Image(pixels), "How many cubes are there?")), Message("assistant", ("two",)))
    said = (Message("user", ("Hello.",)), Message("assistant", ("Good day to you, robot.",)))
    return [
        TrainingSource(name="scenes", conversations=[seen], weight=1.0),
        TrainingSource(name="replay", conversations=[said, said[:1] + seen[1:]], weight=3.0),
    ]


def train(out: Path, model: str = "nano", *, shard: bool = False, accumulate: int = 1, rank: int = 0) -> None:
    """Stage I; with LoRA of a rank above 0."""
    backbone = MODELS[model]()
    loop = LoopConfig(
        steps=STEPS,
        batch_size=ROWS,
        lr=RATE,
        log_every=1,
        save_every=2,
        keep=9,
        eval_every=2,
        shard=shard,
        accumulate=accumulate,
    )

    def evaluate(step: int) -> dict[str, float]:
        return {"letters": float(len(backbone.answer([Message("user", ("Hello.",))], max_tokens=4)))}

    config = Stage1Config(loop=loop, lora=Lora(rank=rank))
    train_stage1(backbone, sources(), config, out, on_eval=evaluate)


def train_policy(
    out: Path,
    data: Path,
    *,
    shard: bool = False,
    policy: PolicyConfig = POLICY,
    rows: int = 2 * ROWS,
    live: int | None = None,
) -> None:
    """Stage II, on the datasets of two robots in `data`: from a cache, or live with so many workers."""
    config = PolicyTrainingConfig(
        datasets=(data / "arm", data / "leg"),
        backbone=str(data / "backbone"),
        intents=HiddenStateConfig(layer=1, cameras=("base",), workers=live or 0, stride=2),
        loop=LoopConfig(steps=STEPS, batch_size=rows, lr=1e-3, log_every=1, shard=shard),
        policy=policy,
        cache=out / "cache" if live is None else None,
        execute=3,
        held_out=0.3,
        validation_batches=2,
    )
    train_stage2(config, out, {})


def log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def make_data(folder: Path) -> None:
    folder.mkdir()
    make_backbone(folder / "backbone")
    for robot, joints in (("arm", 2), ("leg", 3)):
        make_dataset(folder, robot, joints)


def require_same(
    out: Path, other: Path, weights_file: str = "backbone/model.safetensors", lr: float = RATE
) -> None:
    for row, same in zip(log(out), log(other), strict=True):
        assert row.keys() == same.keys()
        for name in row.keys() - {"seconds", "samples_per_s", "tokens_per_s", "data_share", "padding_share"}:
            assert row[name] == pytest.approx(same[name], rel=1e-5), (row["step"], name)
    weights, expected = (load_file(folder / weights_file) for folder in (out, other))
    apart = torch.cat([(weights[name] - value).abs().flatten() for name, value in expected.items()])
    # AdamW divides by the gradient's size: where that is all rounding, a weight may differ by a part of lr.
    # How many weights do depends on the processor (0.05 to 0.1 % on two of them).
    assert apart.max() < lr and (apart > lr / 100).float().mean() < 1e-2


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of runs of one process, by model."""
    out = tmp_path_factory.mktemp("alone")
    for model in MODELS:
        train(out / model, model)
    make_data(out / "data")
    train(out / "lora", rank=2)
    train_policy(out / "policy", out / "data")
    train_policy(out / "no-future", out / "data", policy=NO_FUTURE, rows=2)
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of runs of two processes."""
    out = tmp_path_factory.mktemp("two")
    make_data(out / "data")
    launch(__file__, str(out))
    return out


@pytest.mark.parametrize("model", ["nano", "qwen3"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_like_one(alone: Path, two: Path, kind: str, model: str) -> None:
    require_same(two / kind / model, alone / model)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_the_policy_like_one(alone: Path, two: Path, kind: str) -> None:
    """The parts of a step, with unlike numbers of real values, give the gradient of the whole."""
    require_same(two / kind / "policy", alone / "policy", "checkpoint/policy.safetensors", lr=1e-3)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_adapters_like_one(alone: Path, two: Path, kind: str) -> None:
    require_same(two / kind / "lora", alone / "lora")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_with_a_robot_each_and_an_unused_head_train_like_one(
    alone: Path, two: Path, kind: str
) -> None:
    """A batch of two samples: a process has one robot, often another than the other process has."""
    weights = "checkpoint/policy.safetensors"
    require_same(two / kind / "no-future", alone / "no-future", weights, lr=1e-3)


@pytest.mark.parametrize("kind", ["ddp-from-fsdp2", "fsdp2-from-ddp"])
def test_ddp_and_fsdp2_resume_from_each_other(alone: Path, two: Path, kind: str) -> None:
    require_same(two / kind, alone / "nano")


@pytest.mark.slow
def test_two_processes_with_a_worker_each_train_the_policy_live_like_one(tmp_path: Path) -> None:
    """Without a cache: each worker prepares the prompts of its process, whose own backbone reads them."""
    make_data(tmp_path / "data")
    train_policy(tmp_path / "alone", tmp_path / "data", live=0)
    launch(__file__, str(tmp_path), "live")
    for kind in ("ddp", "fsdp2"):
        require_same(tmp_path / kind, tmp_path / "alone", "checkpoint/policy.safetensors", lr=1e-3)


def test_one_process_with_parts_trains_as_without(alone: Path, tmp_path: Path) -> None:
    train(tmp_path, accumulate=2)
    require_same(tmp_path, alone / "nano")


def go_on(old: Path, new: Path, step: int) -> Path:
    """Copy a run as it was after a step."""
    new.mkdir()
    for file in (old / "inputs.json", old / "log.jsonl", *old.glob(f"state-{step:08d}.*")):
        shutil.copy(file, new / file.name)
    return new


def work_live(out: Path) -> None:
    """Train the policy without a cache."""
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    for kind, shard in (("ddp", False), ("fsdp2", True)):
        train_policy(out / kind, out / "data", shard=shard, live=1)
    state.destroy_process_group()


def work(out: Path) -> None:
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    loss.LOGITS_AT_ONCE = 2_000  # several chunks a batch; the run of one process has one
    for model in MODELS:
        train(out / "ddp" / model, model)
        train(out / "fsdp2" / model, model, shard=True)
    for kind, shard in (("ddp", False), ("fsdp2", True)):
        train(out / kind / "lora", shard=shard, rank=2)
        train_policy(out / kind / "policy", out / "data", shard=shard)
        train_policy(out / kind / "no-future", out / "data", shard=shard, policy=NO_FUTURE, rows=2)
    if state.is_main_process:
        go_on(out / "fsdp2/nano", out / "ddp-from-fsdp2", 2)
        go_on(out / "ddp/nano", out / "fsdp2-from-ddp", 2)
    state.wait_for_everyone()
    train(out / "ddp-from-fsdp2")
    train(out / "fsdp2-from-ddp", shard=True)
    state.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    (work_live if "live" in sys.argv[2:] else work)(Path(sys.argv[1]))
