"""Stage I killed with SIGKILL in the middle goes on to the same bits."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest
import torch

from blm.backbone import build_nano
from blm.training.loop.loop import LoopConfig
from blm.training.loop.state import checkpoints
from blm.training.sft.lora import Lora
from blm.training.sft.train import Stage1Config, TrainingSource, train_stage1
from blm.types import Image, Message

KINDS = {"full": Lora(), "lora": Lora(rank=4, dropout=0.2)}
"""Dropout draws from torch's generator, whose state must come back too."""
STEPS, SAVE_EVERY = 16, 5


def train(out: Path, kind: str, pack_length: int, pause: float = 0.0) -> None:
    rng = np.random.default_rng(0)
    scenes = [
        (
            Message("user", (Image(rng.integers(0, 256, (112, 112, 3), np.uint8)), "How many cubes?")),
            Message("assistant", (word,)),
        )
        for word in ("one", "two", "three")
    ]
    said = [(Message("user", ("Hello.",)), Message("assistant", ("Good day to you, robot.",)))]
    sources = [
        TrainingSource(name="scenes", conversations=scenes),
        TrainingSource(name="replay", conversations=said),
    ]
    loop = LoopConfig(
        steps=STEPS, batch_size=4, lr=3e-3, log_every=1, eval_every=1, save_every=SAVE_EVERY, keep=2
    )
    config = Stage1Config(loop=loop, lora=KINDS[kind], pack_length=pack_length)

    def wait(step: int) -> dict[str, float]:
        time.sleep(pause)
        return {}

    train_stage1(build_nano(["How many cubes?", "Hello."]), sources, config, out, on_eval=wait)


def die(out: Path, kind: str, pack_length: int) -> None:
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    train(out, kind, pack_length, pause=0.3)


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Real processes that need not import torch anew each time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["blm.training.sft.train"])
    return context


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("pack_length", [0, 64])
def test_a_killed_run_resumes_to_the_same_bits(
    tmp_path: Path, processes: ForkServerContext, kind: str, pack_length: int
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    victim = processes.Process(target=die, args=(cut, kind, pack_length))
    victim.start()
    log, deadline = cut / "log.jsonl", time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < 8:
        assert victim.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    victim.kill()
    victim.join()
    train(whole, kind, pack_length)
    assert victim.exitcode == -signal.SIGKILL and not (cut / "backbone").exists()
    assert [file.name for file in checkpoints(cut)] == ["state-00000005.safetensors"]
    train(cut, kind, pack_length)
    steps = [file.name for file in checkpoints(cut)]
    assert steps == ["state-00000015.safetensors", "state-00000016.safetensors"]
    names = ["backbone/model.safetensors"] + ["adapter/adapter_model.safetensors"] * (kind == "lora")
    for name in names:
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
