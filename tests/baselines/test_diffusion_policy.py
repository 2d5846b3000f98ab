"""Diffusion Policy: its schedule, its shapes, that it learns, and that its checkpoint comes back the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from blm.app.policies import load_checkpoint
from blm.baselines.diffusion_policy import BaselineConfig, DiffusionPolicy, train_baseline
from blm.baselines.network import DiffusionConfig, DiffusionNetwork, ImageEncoder, bag_of_words
from blm.datasets.lerobot import open_dataset
from blm.evaluation.physical.policy_host import ActsInBatches
from blm.policy.network import PolicyConfig
from blm.policy.unet import noise_scheduler
from blm.training.loop.loop import LoopConfig
from blm.types import BlmError, Observation, Policy
from tests.support.hidden_states import make_dataset

SIZES = DiffusionConfig(widths=(16, 32), image_width=16, words=64, text_width=8, robot_width=4)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> BaselineConfig:
    folder = tmp_path_factory.mktemp("data")
    for robot, joints in (("arm", 2), ("leg", 3)):
        make_dataset(folder, robot, joints)
    return BaselineConfig(
        datasets=(folder / "arm", folder / "leg"),
        cameras=("base",),
        loop=LoopConfig(steps=400, batch_size=16, lr=3e-3, log_every=50),
        network=SIZES,
        actions=PolicyConfig(max_dim=5, horizon=8),
        execute=3,
    )


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory) -> Path:
    return train_baseline(config, tmp_path_factory.mktemp("run"), {"command": "test"})


def seen(config: BaselineConfig, number: int, frame: int, seed: int = 0) -> Observation:
    data = open_dataset(config.datasets[number])
    return Observation(
        images={"base": data.frames([frame], "base")[0]},
        state=data.states[frame],
        instruction=data.instructions[data.task_index[frame]],
        robot=data.space.robot,
        seed=seed,
    )


def test_noise_goes_from_none_to_all():
    """Squared cosine, Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17."""
    steps = noise_scheduler(SIZES.train_steps)
    t = (np.arange(100) + 1) / 100
    expected = (np.cos((t + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)) ** 2
    np.testing.assert_allclose(steps.alphas_cumprod[:-1], expected[:-1], rtol=1e-3)
    assert steps.alphas_cumprod[-1] < 1e-4


def test_a_spatial_softmax_follows_its_feature():
    encoder = ImageEncoder(16).eval()
    dark = torch.full((2, 3, 112, 112), -1.0)
    dark[0, :, 48:56, 16:24], dark[1, :, 48:56, 80:88] = 1.0, 1.0
    with torch.no_grad():
        encoder.body[-1].skip.weight.mul_(50)
        rows, columns = encoder(dark).chunk(2, dim=-1)
    assert rows.shape == (2, 16)
    moved = (columns[1] - columns[0]).abs()
    assert moved.max() > 0.5 and (rows[1] - rows[0]).abs().max() < 0.2, "it moved sideways only"


def test_the_denoiser_has_the_shape_of_its_input_for_any_number_of_levels():
    for widths in ((16,), (16, 24), (16, 24, 32)):
        network = DiffusionNetwork(replace(SIZES, widths=widths), ("base", "wrist"), 3, 5)
        pictures = [torch.zeros(2, 3, 64, 64)] * 2
        words = [bag_of_words("push it", 64), bag_of_words("lift", 64)]
        condition = network.encode_condition(pictures, torch.zeros(2, 5), words, torch.tensor([0, 2]))
        noisy = torch.randn(2, 16, 5)
        assert network.unet(noisy, torch.tensor([0.0, 99.0]), condition).shape == noisy.shape


def test_the_bag_of_words_distinguishes_words_and_their_order():
    same = bag_of_words("Push the cube.", 1024), bag_of_words("push THE cube", 1024)
    assert torch.equal(*same) and len(same[0]) == 5
    assert set(bag_of_words("cube the push", 1024).tolist()) != set(same[0].tolist())
    assert bag_of_words("", 1024).tolist() == bag_of_words("nothing", 1024).tolist()


def test_it_learns_both_robots_and_survives_a_round_trip(config, trained):
    rows = [json.loads(line) for line in (trained.parent / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    policy = load_checkpoint(trained)
    assert isinstance(policy, DiffusionPolicy) and isinstance(policy, Policy | ActsInBatches)
    again = DiffusionPolicy.load(trained)
    for number in (0, 1):
        data, observation = open_dataset(config.datasets[number]), seen(config, number, 3)
        actions = policy.act(observation).actions
        assert (
            actions.shape == (8, data.space.dim) and np.abs(actions - data.actions[3:11])[:, :-1].mean() < 0.1
        )
        np.testing.assert_array_equal(actions, again.act(observation).actions)
        other = policy.act(seen(config, number, 3, seed=1)).actions
        assert not np.array_equal(actions, other), "another seed is other noise"
    both = [seen(config, 0, 3), seen(config, 1, 5)]
    for chunk, observation in zip(policy.act_batch(both), both, strict=True):
        np.testing.assert_allclose(chunk.actions, policy.act(observation).actions, atol=1e-4)


def test_a_killed_training_continues_to_the_same_bits(config, tmp_path, monkeypatch):
    config = replace(config, loop=replace(config.loop, steps=8, save_every=3))
    whole = train_baseline(config, tmp_path / "whole", {})
    with monkeypatch.context() as patch:
        patch.setattr(
            "blm.training.loop.loop._is_due", lambda done, every: 1 / 0 if done == 5 else done % every == 0
        )
        with pytest.raises(ZeroDivisionError):
            train_baseline(config, tmp_path / "parts", {})
    parts = train_baseline(config, tmp_path / "parts", {})
    assert (whole / "policy.safetensors").read_bytes() == (parts / "policy.safetensors").read_bytes()
    with pytest.raises(BlmError, match="holds another run"):
        train_baseline(replace(config, weights={"leg": 2.0}), tmp_path / "parts", {})


def test_bad_sizes_and_altered_files_are_refused(trained, tmp_path):
    with pytest.raises(BlmError, match="multiples of 8"):
        DiffusionConfig(widths=(10,))
    (trained / "stats.json").write_text("{}")
    with pytest.raises(BlmError, match=r"stats\.json is altered"):
        DiffusionPolicy.load(trained)
