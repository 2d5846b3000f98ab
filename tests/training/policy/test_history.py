"""Policies that see several observations: data, training, checkpoint and acting agree."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from blm.backbone.backbone import Backbone
from blm.backbone.prompt import control_prompt
from blm.datasets.lerobot import open_dataset
from blm.policy.policy import CheckpointPolicy
from blm.training.loop.loop import LoopConfig
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hidden_states import HiddenStateConfig, LiveHiddenStates, observed_images
from blm.training.policy.train import train_stage2
from blm.types import BlmError, Observation
from tests.support.hidden_states import make_backbone, make_dataset
from tests.support.policy_training import POLICY

STEPS = 3
"""Control steps between observations."""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PolicyTrainingConfig:
    folder = tmp_path_factory.mktemp("history")
    make_backbone(folder / "backbone")
    make_dataset(folder, "arm", 2)
    return PolicyTrainingConfig(
        datasets=(folder / "arm",),
        backbone=str(folder / "backbone"),
        intents=HiddenStateConfig(
            layer=1, cameras=("base",), frames=2, frame_steps=STEPS, stride=2, workers=0, shard_frames=20
        ),
        loop=LoopConfig(steps=2, batch_size=8, lr=4e-3),
        policy=POLICY,
        execute=STEPS,
        held_out=0.3,
        validation_batches=1,
    )


def test_a_prompt_shows_the_frames_before_it_and_the_first_at_the_beginning(config):
    data = open_dataset(config.datasets[0])
    begin = int(data.starts[1])
    frames = np.array([begin, begin + 1, begin + 5])
    images = observed_images(data, frames, config.intents)
    assert list(images) == [f"base {STEPS} steps ago", "base"]
    for name, wanted in zip(images, ([begin, begin, begin + 2], frames), strict=True):
        assert np.array_equal(images[name], data.frames(wanted, "base")), name


def test_the_trained_policy_acts_on_the_prompts_of_training(config, tmp_path, monkeypatch):
    data = open_dataset(config.datasets[0])
    checkpoints = {}
    for name, cache in (("cached", tmp_path / "cache"), ("live", None)):
        folder = train_stage2(replace(config, cache=cache), tmp_path / name, {})
        checkpoints[name] = CheckpointPolicy.load(folder)
    policy = checkpoints["live"]
    assert policy.contract.frames == 2
    frame = int(data.starts[1]) + 5
    pictures = data.frames([frame - STEPS, frame], "base")
    before, now = (
        Observation(
            images={"base": picture},
            state=data.states[frame],
            instruction=data.instructions[data.task_index[frame]],
            robot="arm",
        )
        for picture in pictures
    )
    seen = []
    bridge = policy.network.bridge.forward
    monkeypatch.setattr(policy.network.bridge, "forward", lambda h, m: seen.append(h[m]) or bridge(h, m))
    policy.act(replace(now, history=(before,)))
    trained_on = LiveHiddenStates(policy.backbone, data, config.intents).read(np.array([frame]))[0]
    np.testing.assert_allclose(seen[0].numpy(), trained_on, atol=1e-5)
    weights = [dict(one.network.state_dict()) for one in checkpoints.values()]
    for name, value in weights[0].items():  # float16 in the cache
        np.testing.assert_allclose(value, weights[1][name], atol=5e-3, err_msg=name)


def test_settings_that_cannot_act_as_they_are_trained_are_refused(config):
    with pytest.raises(BlmError, match="frame_steps 4 must equal execute = 3"):
        replace(config, intents=replace(config.intents, frame_steps=4))
    with pytest.raises(BlmError, match="frames"):
        replace(config.intents, frames=0)


def test_more_frames_give_other_hidden_states(config):
    backbone = Backbone.load(config.backbone)
    data = open_dataset(Path(config.datasets[0]))
    one, two = (
        LiveHiddenStates(backbone, data, replace(config.intents, frames=frames)).read(np.array([7]))[0]
        for frames in (1, 2)
    )
    prompt = control_prompt(
        data.instructions[data.task_index[7]], "arm", {"base": data.frames([7], "base")[0]}
    )
    alone = backbone.tap(backbone.read([prompt], side="right"), 1).hidden[0].numpy()
    np.testing.assert_allclose(one, alone, atol=1e-5)
    assert len(two) > len(one)
