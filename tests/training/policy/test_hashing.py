"""How often Stage II hashes a backbone, which takes a minute for 7 billion parameters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blm.backbone.weights import Weights
from blm.training.loop.loop import LoopConfig
from blm.training.policy import train
from blm.training.policy.backbone_tuning import BackboneTuning
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hidden_states import CachePrecision, HiddenStateConfig
from blm.training.policy.train import train_stage2
from tests.support.hidden_states import make_backbone, make_dataset
from tests.support.policy_training import POLICY


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PolicyTrainingConfig:
    folder = tmp_path_factory.mktemp("hashing")
    make_backbone(folder / "backbone")
    for robot, joints in (("arm", 2), ("leg", 3)):
        make_dataset(folder, robot, joints, lengths=(9, 8, 9))
    return PolicyTrainingConfig(
        datasets=(folder / "arm", folder / "leg"),
        backbone=str(folder / "backbone"),
        intents=HiddenStateConfig(layer=1, cameras=("base",), workers=0, stride=2),
        loop=LoopConfig(steps=2, batch_size=4, lr=1e-3),
        policy=POLICY,
        execute=3,
        held_out=0.3,
        validation_batches=1,
    )


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens: "hash" of all weights of a backbone, and "loop", the training loop."""
    seen = list[str]()
    hash_weights, run_loop = Weights._hash, train.run_policy_loop

    def hashed(self: Weights, buffers: Any) -> str:
        seen.append("hash")
        return hash_weights(self, buffers)

    def looped(*args: Any) -> None:
        seen.append("loop")
        run_loop(*args)

    monkeypatch.setattr(Weights, "_hash", hashed)
    monkeypatch.setattr(train, "run_policy_loop", looped)
    return seen


@pytest.mark.parametrize("precision", ["float16", "compact"])
def test_a_frozen_backbone_is_hashed_once_before_and_once_after_the_training(
    config: PolicyTrainingConfig, events: list[str], tmp_path: Path, precision: CachePrecision
) -> None:
    intents = replace(config.intents, precision=precision)
    config = replace(config, cache=tmp_path / "cache", intents=intents)
    checkpoint = train_stage2(config, tmp_path / "out", {})
    assert (tmp_path / "out/best").is_dir()
    assert events == ["hash", "loop", "hash"]
    events.clear()
    train_stage2(replace(config, start=checkpoint), tmp_path / "more", {})
    assert events == ["hash", "hash", "loop", "hash"], "once more: the backbone of the checkpoint"


def test_a_tuned_backbone_is_hashed_once_before_the_training_and_in_each_checkpoint(
    config: PolicyTrainingConfig, events: list[str], tmp_path: Path
) -> None:
    config = replace(config, tune=BackboneTuning(kind="last_blocks"))
    train_stage2(config, tmp_path / "out", {})
    assert (tmp_path / "out/best").is_dir()
    assert events == ["hash", "loop", "hash", "hash"]
