"""The U-Net head of Diffusion Policy behind the bridge."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from blm.app.edge.export import ExportConfig, export_policy
from blm.bridge import BridgeConfig
from blm.datasets.transforms import RobotTransforms
from blm.policy import flow
from blm.policy.network import PolicyBatch, PolicyNetwork
from blm.policy.policy import CheckpointPolicy, RealTimeChunkingPolicy
from blm.policy.unet import UNetPolicyNetwork, make_network, noise_scheduler
from blm.training.loop.loop import LoopConfig
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.policy.train import train_stage2
from blm.types import BlmError
from tests.policy.test_policy import CONFIG, DIMS, HIDDEN, make_batch, sample
from tests.support.hidden_states import make_backbone, make_dataset
from tests.support.policies import make_observation, make_policy
from tests.support.policy_training import POLICY

UNET = replace(CONFIG, head="unet", unet_widths=(16, 32), horizon=4, sampler_steps=16)


def unet(seed: int = 0) -> UNetPolicyNetwork:
    torch.manual_seed(seed)
    network = make_network(UNET, HIDDEN, len(DIMS))
    assert isinstance(network, UNetPolicyNetwork)
    return network


def batch_of(size: int = 8, seed: int = 0) -> PolicyBatch:
    batch = make_batch(size, seed)
    cut = {name: getattr(batch, name)[:, :4] for name in ("actions", "real", "noise")}
    return replace(batch, **cut)


def test_the_config_chooses_the_head() -> None:
    assert type(make_network(CONFIG, HIDDEN, 2)) is PolicyNetwork
    assert type(make_network(UNET, HIDDEN, 2)) is UNetPolicyNetwork
    assert "head" not in CONFIG.facts() and UNET.facts()["unet_widths"] == (16, 32)


@pytest.mark.parametrize(
    "change",
    [{"horizon": 5}, {"unet_widths": (16, 12)}, {"unet_widths": ()}, {"unet_widths": (16, 32, 64, 96)}],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(BlmError, match="unet_widths"):
        replace(UNET, **change)


def test_a_missing_package_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    noise_scheduler.cache_clear()
    monkeypatch.setitem(sys.modules, "diffusers.schedulers.scheduling_ddim", None)
    with pytest.raises(BlmError, match=r"blm\[baselines\]"):
        make_network(UNET, HIDDEN, 2)


def test_flow_times_become_uniform_diffusion_steps_with_noise_at_the_end() -> None:
    tau = flow.sample_time(40_000, torch.Generator().manual_seed(0))
    shares = torch.histc(flow.time_quantile(tau), bins=10, min=0, max=1) / len(tau)
    assert (shares - 0.1).abs().max() < 0.01
    drawn = torch.rand(1000, generator=torch.Generator().manual_seed(1))
    tau = flow.sample_time(1000, torch.Generator().manual_seed(1))
    inside = tau > 0
    torch.testing.assert_close(flow.time_quantile(tau)[inside], drawn[inside], atol=1e-5, rtol=1e-4)


def test_padding_does_not_matter_and_the_loss_is_the_mean_over_real_elements() -> None:
    network, batch = unet(), batch_of()
    losses = network.loss(batch, network)
    assert float(losses["loss"].detach()) == float(losses["loss_flow"].detach()) > 0
    junk = torch.where(batch.real, batch.actions, torch.full_like(batch.actions, 7.0))
    assert torch.equal(network.loss(replace(batch, actions=junk), network)["loss"], losses["loss"])
    losses["loss"].backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None]


def test_it_overfits_one_batch_and_samples_its_actions() -> None:
    network, one = unet(), batch_of()
    names = ("hidden", "mask", "future_hidden", "future_mask", "state", "actions", "real", "embodiment")
    batch = replace(one, **{name: torch.cat([getattr(one, name)] * 4) for name in names})
    optimizer = torch.optim.Adam(network.parameters(), 5e-3, betas=(0.9, 0.95))
    g = torch.Generator().manual_seed(0)
    for step in range(400):
        noise, tau = torch.randn(batch.actions.shape, generator=g), flow.sample_time(32, g)
        loss = network.loss(replace(batch, noise=noise, tau=tau), network)["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 400)
        optimizer.step()
    network.eval()
    made = sample(network, one, one.noise)
    assert (made - one.actions)[one.real].abs().mean() < 0.15
    assert torch.equal(made, sample(network, one, one.noise)), "the schedule keeps no state"
    assert (made[:, :, 4:][one.embodiment == 0] == 0).all()


def shortened(transforms: RobotTransforms) -> RobotTransforms:
    """The transforms for chunks of 4 actions."""
    steps = transforms.normalize_actions
    return replace(transforms, normalize_actions=replace(steps, low=steps.low[:4], high=steps.high[:4]))


def test_its_checkpoint_comes_back_and_says_what_it_cannot_do(tmp_path: Path) -> None:
    policy = make_policy()
    config = replace(UNET, bridge=BridgeConfig(width=16, latents=3, blocks=1, heads=2), horizon=4)
    network = make_network(config, 32, 2)
    policy = CheckpointPolicy(
        backbone=policy.backbone,
        frozen=policy.frozen,
        tap=policy.tap,
        network=network,
        transforms={robot: shortened(one) for robot, one in policy.transforms.items()},
        contract=replace(policy.contract, horizon=4),
    )
    policy.save(tmp_path / "policy", {"command": "test"})
    again = CheckpointPolicy.load(tmp_path / "policy")
    seen = [make_observation(seed=3), make_observation("leg")]
    assert isinstance(again.network, UNetPolicyNetwork) and again.network.config == config
    for ours, theirs in zip(policy.act_batch(seen), again.act_batch(seen), strict=True):
        assert np.array_equal(ours.actions, theirs.actions)
    with pytest.raises(BlmError, match="diffusion transformer"):
        export_policy(str(tmp_path / "policy"), tmp_path / "graphs", ExportConfig())
    chunking = RealTimeChunkingPolicy(again)
    chunking.act(seen[0])
    with pytest.raises(BlmError, match="real-time chunking"):
        chunking.act(seen[0])


def test_stage2_trains_it_on_the_same_frozen_features(tmp_path: Path) -> None:
    make_backbone(tmp_path / "backbone")
    make_dataset(tmp_path, "arm", 2)
    config = PolicyTrainingConfig(
        datasets=(tmp_path / "arm",),
        backbone=str(tmp_path / "backbone"),
        intents=HiddenStateConfig(layer=1, cameras=("base",), workers=0),
        loop=LoopConfig(steps=4, batch_size=4, lr=1e-3),
        policy=replace(POLICY, head="unet", unet_widths=(16, 32), horizon=8, sampler_steps=4),
        cache=tmp_path / "cache",
        execute=3,
        held_out=0.3,
    )
    folder = train_stage2(config, tmp_path / "run", {"command": "test"})
    assert isinstance(CheckpointPolicy.load(folder).network, UNetPolicyNetwork)
