"""Stage II with pooled picture tokens, and the checkpoint that acts with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from blm.backbone.pooling import tap_pooled
from blm.backbone.prompt import control_prompt
from blm.datasets.lerobot import open_dataset
from blm.policy.checkpoint import read_config
from blm.policy.policy import CheckpointConfig, CheckpointPolicy
from blm.training.loop.loop import LoopConfig
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hidden_states import HiddenStateConfig, LiveHiddenStates
from blm.training.policy.train import train_stage2
from blm.types import BlmError, Observation
from tests.support.backbones import tiny_smolvlm
from tests.support.hidden_states import make_backbone, make_dataset
from tests.support.policy_training import POLICY


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PolicyTrainingConfig:
    folder = tmp_path_factory.mktemp("pooled")
    tiny_smolvlm("smolvlm").save(folder / "backbone")
    make_dataset(folder, lengths=(9, 8))
    return PolicyTrainingConfig(
        datasets=(folder / "arm",),
        backbone=str(folder / "backbone"),
        intents=HiddenStateConfig(
            layer=1, cameras=("base", "wrist"), workers=0, stride=2, pool=2, precision="compact"
        ),
        loop=LoopConfig(steps=2, batch_size=4, lr=1e-3),
        policy=POLICY,
        cache=folder / "cache",
        execute=3,
        held_out=0.5,
        validation_batches=1,
    )


@pytest.fixture(scope="module")
def trained(config: PolicyTrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_stage2(config, tmp_path_factory.mktemp("run"), {})


def test_a_policy_acts_on_the_tokens_that_it_was_trained_on(
    config: PolicyTrainingConfig, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, data = CheckpointPolicy.load(trained), open_dataset(config.datasets[0])
    images = {name: data.frames([3], name)[0] for name in ("base", "wrist")}
    text = data.instructions[data.task_index[3]]
    seen = list[torch.Tensor]()
    bridge = policy.network.bridge.forward
    monkeypatch.setattr(policy.network.bridge, "forward", lambda h, m: seen.append(h[m]) or bridge(h, m))
    policy.act(Observation(images=images, state=data.states[3], instruction=text, robot="arm"))
    wanted = tap_pooled(
        policy.backbone, policy.backbone.read([control_prompt(text, "arm", images)], side="right"), 1, 2
    )
    assert policy.tap.pool == 2 and torch.equal(seen[0], wanted.hidden[wanted.mask])
    live = LiveHiddenStates(policy.backbone, data, config.intents).read(np.array([3]))[0]
    np.testing.assert_allclose(live, seen[0].numpy(), atol=1e-5)
    whole = LiveHiddenStates(policy.backbone, data, replace(config.intents, pool=1)).read(np.array([3]))[0]
    assert len(whole) == len(live) + 2 * 3  # two pictures, each of 2 x 2 tokens


def test_an_older_checkpoint_pools_nothing(trained: Path) -> None:
    stored = read_config(trained)
    assert stored.pop("pool") == 2
    assert CheckpointConfig.from_json(stored).tap.pool == 1


def test_another_pool_is_refused(config: PolicyTrainingConfig, trained: Path, tmp_path: Path) -> None:
    whole = replace(config, intents=replace(config.intents, pool=1))
    with pytest.raises(BlmError, match="pool of the checkpoint to start from is 2, here it is 1"):
        train_stage2(replace(whole, start=trained), tmp_path / "more", {})
    with pytest.raises(BlmError, match="was made for another pool; name another folder"):
        train_stage2(whole, tmp_path / "whole", {})
    plain = replace(config, cache=tmp_path / "plain", intents=replace(config.intents, precision="float16"))
    train_stage2(plain, tmp_path / "run", {})
    unlike = replace(plain, intents=replace(plain.intents, pool=1))
    with pytest.raises(BlmError, match="is stale: it has another pool; name another folder"):
        train_stage2(unlike, tmp_path / "unlike", {})
    assert json.loads((tmp_path / "plain/arm/spec.json").read_text())["pool"] == 2


def test_nano_has_no_grid(config: PolicyTrainingConfig, tmp_path: Path) -> None:
    make_backbone(tmp_path / "nano")
    nano = replace(config, backbone=str(tmp_path / "nano"), cache=tmp_path / "cache")
    for cache in (tmp_path / "cache", None):
        with pytest.raises(BlmError, match="'blm_conv_vision' cannot be pooled, because they form no grid"):
            train_stage2(replace(nano, cache=cache), tmp_path / f"run {cache is None}", {})
