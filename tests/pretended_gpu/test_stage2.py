"""Stage II on a pretended GPU: the weights of the CPU, one synchronisation per step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blm.backbone import Backbone
from blm.policy.policy import CheckpointPolicy
from blm.training.loop.loop import LoopConfig
from blm.training.policy import cache_workers
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hashed_backbone import HashedBackbone
from blm.training.policy.hidden_state_cache import cache_hidden_states
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.policy.train import train_stage2
from blm.types import BlmError
from tests.support.hidden_states import make_backbone, make_dataset
from tests.support.policy_training import POLICY
from tests.support.pretended_gpu import PretendedGpu, table
from tests.support.pretended_gpu.comparison import GPU, assert_same, log_rows, of_the_package


@pytest.fixture(scope="module")
def policy_config(tmp_path_factory: pytest.TempPathFactory) -> PolicyTrainingConfig:
    folder = tmp_path_factory.mktemp("stage2")
    make_backbone(folder / "backbone")
    for robot, joints in (("arm", 2), ("leg", 3)):
        make_dataset(folder, robot, joints, lengths=(9, 8))
    return PolicyTrainingConfig(
        datasets=(folder / "arm", folder / "leg"),
        backbone=str(folder / "backbone"),
        intents=HiddenStateConfig(layer=1, cameras=("base",), workers=0, stride=2),
        loop=LoopConfig(steps=3, batch_size=8, lr=4e-3, log_every=1),
        policy=POLICY,
        execute=3,
        held_out=0.5,
        validation_batches=1,
        dtype="float32",
    )


@pytest.mark.parametrize("way", ["cached", "compact", "compact, projected", "live", "muon in parts"])
def test_stage_two_waits_once_a_step(
    gpu: PretendedGpu,
    policy_config: PolicyTrainingConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    saved: dict[str, list[Tensor]] = {}

    def save(self: CheckpointPolicy, folder: Path, facts: Any, *, proved: bool = False) -> None:
        if folder.name == "checkpoint":
            saved[folder.parent.name] = [*self.network.state_dict().values()]

    monkeypatch.setattr(CheckpointPolicy, "save", save)
    monkeypatch.setattr("blm.training.policy.train.BestCheckpoint.update", lambda *_: None)
    loop = policy_config.loop
    if way == "muon in parts":
        loop = replace(loop, muon=0.02 * hasattr(torch.optim, "Muon"), accumulate=2)
    for name in ("cpu", GPU):
        cache = None if way == "live" else tmp_path / f"cache {name}"
        intents = policy_config.intents
        if way.startswith("compact"):
            intents = replace(intents, precision="compact", dims=16 if "projected" in way else 1024)
        config = replace(policy_config, loop=loop, device=name, cache=cache, intents=intents)
        with gpu.training_steps() as steps:
            train_stage2(config, tmp_path / name, {})
    assert_same(saved[GPU], saved["cpu"])
    assert log_rows(tmp_path / GPU) == log_rows(tmp_path / "cpu")
    if way == "live":  # the backbone runs in the step: transformers reads masks and checks placeholders
        assert all(len(step) <= 4 for step in steps), table(steps[-1])
        steps = [of_the_package(step) for step in steps]
    assert [len(step) for step in steps] == [1, 1], table(steps[-1])


def test_a_cache_is_filled_on_the_gpu_by_the_training_process(
    gpu: PretendedGpu, policy_config: PolicyTrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blm.datasets.lerobot import open_dataset

    def run_units(write: Any, *_: Any, **options: Any) -> None:
        assert options["workers"] == 0 and "setup" not in options
        raise BlmError(str(write.__self__.live.backbone.model.device))

    monkeypatch.setattr(cache_workers, "run_units", run_units)
    source = policy_config.backbone
    hashed = HashedBackbone.of(Backbone.load(source, device=GPU), source)
    dataset = open_dataset(policy_config.datasets[0])
    with pytest.raises(BlmError, match=f"^{GPU}$"):
        cache_hidden_states(hashed, dataset, replace(policy_config.intents, workers=2), tmp_path)
