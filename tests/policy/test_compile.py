"""Compiled policies: one graph a part, the same actions, few recompilations."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from blm.app.model import BLM
from blm.backbone.compilation import Compiler, batch_bucket, pad_prompts, require_compiler
from blm.policy.policy import CheckpointPolicy, RealTimeChunkingPolicy
from blm.types import BlmError, Observation
from tests.support.backbones import picture


@pytest.fixture
def policy() -> CheckpointPolicy:
    torch._dynamo.reset()
    return BLM.from_pretrained("blm-nano", actions_only=True).policy


def seen(policy: CheckpointPolicy, count: int, instruction: str = "push the cube.") -> list[Observation]:
    contract = policy.contract
    robots = list(contract.action_spaces)
    return [
        Observation(
            robot=(robot := robots[i % len(robots)]),
            instruction=instruction,
            images={
                camera: picture(i, contract.image_size, contract.image_size) for camera in contract.cameras
            },
            state=np.zeros(contract.action_spaces[robot].dim, np.float32),
            seed=i,
        )
        for i in range(count)
    ]


def largest_difference(policy: CheckpointPolicy, wanted: list[np.ndarray], **how: int) -> float:
    found = policy.act_batch(seen(policy, len(wanted)))
    assert len(found) == len(wanted)
    return max(float(np.abs(a.actions - b).max()) for a, b in zip(found, wanted, strict=True))


def test_each_part_is_one_graph_for_every_size_that_was_seen(policy: CheckpointPolicy) -> None:
    wanted = {n: [chunk.actions for chunk in policy.act_batch(seen(policy, n))] for n in (1, 2)}
    counter = CompileCounter()
    policy.compile(Compiler("default", counter))  # as one graph: a break would raise
    policy.warm_up((1, 2))
    assert counter.frame_count == 4
    for chunks in wanted.values():
        assert largest_difference(policy, chunks) < 1e-5
    for text in ("push it.", "push a cube."):
        policy.act_batch(seen(policy, 1, text))
    assert counter.frame_count == 4
    continued = RealTimeChunkingPolicy(policy)
    for _ in range(2):
        continued.act(seen(policy, 1)[0])
    assert counter.frame_count == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when inductor is imported
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor_chooses_the_same_actions(policy: CheckpointPolicy) -> None:
    wanted = [chunk.actions for chunk in policy.act_batch(seen(policy, 1))]
    compiled = CheckpointPolicy.load("blm-nano", actions_only=True, compile="default")
    difference = largest_difference(compiled, wanted)
    print(f"largest difference {difference:.2g}")
    assert difference < 1e-4


def test_sizes_are_rounded_up() -> None:
    assert [batch_bucket(n) for n in (1, 2, 3, 4, 5, 64)] == [1, 2, 4, 4, 8, 64]
    ids = torch.arange(10).view(2, 5)
    padded = pad_prompts({"input_ids": ids, "attention_mask": torch.ones_like(ids), "other": ids[0]}, 7)
    assert padded["input_ids"].shape == (2, 32) and torch.equal(padded["input_ids"][:, :5], ids)
    assert (padded["input_ids"][:, 5:] == 7).all() and padded["attention_mask"].sum() == 10
    assert torch.equal(padded["other"], ids[0])


def test_a_machine_that_cannot_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BlmError, match="cuda-graphs needs a CUDA device, not 'cpu'"):
        require_compiler("cuda-graphs", "cpu")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    require_compiler("none", "cpu")
    with pytest.raises(BlmError, match=r"needs a C\+\+ compiler"):
        CheckpointPolicy.load("blm-nano", compile="default")
