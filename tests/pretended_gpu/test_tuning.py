"""Stage II with a tuned backbone on a pretended GPU: the losses of the CPU, one wait per step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from blm.training.loop.loop import LoopConfig
from blm.training.policy.backbone_tuning import BackboneTuning
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.cotraining import LanguageCotraining
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.policy.train import train_stage2
from blm.training.sft.lora import Lora
from tests.support.conversations import write_conversations
from tests.support.hidden_states import make_backbone, make_dataset
from tests.support.policy_training import POLICY
from tests.support.pretended_gpu import PretendedGpu, table
from tests.support.pretended_gpu.comparison import GPU, log_rows


@pytest.mark.parametrize("kind", ["lora", "last_blocks"])
def test_a_tuned_step_waits_once(
    gpu: PretendedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("blm.policy.policy.CheckpointPolicy.save", lambda *_, **__: None)
    monkeypatch.setattr("blm.training.policy.train.BestCheckpoint.update", lambda *_: None)
    make_backbone(tmp_path / "backbone")
    make_dataset(tmp_path, "arm", 2, lengths=(9, 8))
    words = write_conversations(tmp_path / "words")
    config = PolicyTrainingConfig(
        datasets=(tmp_path / "arm",),
        backbone=str(tmp_path / "backbone"),
        intents=HiddenStateConfig(layer=1, cameras=("base",), workers=0, stride=2),
        loop=LoopConfig(steps=3, batch_size=8, lr=4e-3, log_every=1),
        policy=POLICY,
        execute=3,
        held_out=0.5,
        validation_batches=1,
        dtype="float32",
        tune=BackboneTuning(kind=kind, lora=Lora(rank=2)),  # type: ignore[arg-type]
        cotrain=LanguageCotraining(weight=0.5, corpora=(str(words),), batch_size=4),
    )
    for name in ("cpu", GPU):
        with gpu.training_steps() as steps:
            train_stage2(replace(config, device=name), tmp_path / name, {})
    assert log_rows(tmp_path / GPU) == log_rows(tmp_path / "cpu")
    assert [len(step) for step in steps] == [1, 1], table(steps[-1])
