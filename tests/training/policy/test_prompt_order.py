"""Stage II with the text of the prompt first: recorded, enforced, and acted on with a prefix cache."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from blm.app.stage1 import TrainingCorpus, prepare_stage1
from blm.backbone import Backbone
from blm.backbone.prefix_cache import PrefixCache
from blm.backbone.prompt import PromptOrder, control_prompt
from blm.corpora.format.messages import Conversation
from blm.datasets.lerobot import open_dataset
from blm.policy import checkpoint as checkpoint_module
from blm.policy.checkpoint import read_config
from blm.policy.codec import prompt_version
from blm.policy.policy import CheckpointConfig, CheckpointPolicy
from blm.policy.tap import TapConfig
from blm.training.loop.loop import LoopConfig
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hidden_states import HiddenStateConfig, LiveHiddenStates
from blm.training.policy.train import train_stage2
from blm.training.pretraining.nano import NanoPretrainingConfig
from blm.training.sft.tokenize import tokenize_conversation
from blm.training.sft.train import Stage1Config
from blm.types import BlmError, Message, Observation
from tests.support.backbones import picture
from tests.support.families import FAMILIES
from tests.support.hidden_states import make_dataset
from tests.support.policy_training import POLICY
from tests.support.smol import tiny_smol

IMAGES_BEFORE_TEXT = (
    "{%- for m in messages -%}{{ m.role + ': ' }}"
    "{%- for p in m.content if p.type == 'image' -%}{{ '<image>' }}{%- endfor -%}"
    "{%- for p in m.content if p.type == 'text' -%}{{ p.text }}{%- endfor -%}{{ '<|im_end|>' }}{%- endfor -%}"
)
"""As templates of LLaVA on the hub."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PolicyTrainingConfig:
    folder = tmp_path_factory.mktemp("order")
    tiny_smol().save(folder / "backbone")
    for robot in ("arm", "leg"):
        make_dataset(folder, robot, joints=2 + (robot == "leg"), lengths=(9, 8))
    return PolicyTrainingConfig(
        datasets=(folder / "arm", folder / "leg"),
        backbone=str(folder / "backbone"),
        intents=HiddenStateConfig(
            layer=2, cameras=("base", "wrist"), workers=0, stride=2, prompt="text_first"
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


def observations(config: PolicyTrainingConfig) -> list[Observation]:
    """Frames of two robots with different instructions, and a later frame of the first."""
    found = []
    for robot, frame in ((0, 2), (1, 10), (0, 4)):
        data = open_dataset(config.datasets[robot])
        images = {name: data.frames([frame], name)[0] for name in ("base", "wrist")}
        text = data.instructions[data.task_index[frame]]
        state = data.states[frame]
        found.append(Observation(images=images, state=state, instruction=text, robot=data.space.robot))
    return found


def seen_by(policy: CheckpointPolicy, batch: list[Observation]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The H_k of each observation that the bridge reads, and the actions."""
    seen = list[np.ndarray]()
    bridge = policy.network.bridge.forward

    def spied(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen.extend(h[m].numpy() for h, m in zip(hidden, mask, strict=True))
        return bridge(hidden, mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy.network.bridge, "forward", spied)
        actions = [chunk.actions for chunk in policy.act_batch(batch)]
    return seen, actions


def test_a_policy_acts_on_what_it_was_trained_on(config: PolicyTrainingConfig, trained: Path) -> None:
    policy, batch = CheckpointPolicy.load(trained, actions_only=True), observations(config)
    assert policy.tap == config.intents.tap == TapConfig(layer=2, prompt="text_first")
    cached, actions = seen_by(policy, batch)
    assert isinstance(policy.prefixes, PrefixCache) and len(policy.prefixes) == 2
    again, same = seen_by(policy, batch)
    assert all(np.array_equal(a, b) for a, b in zip([*cached, *actions], [*again, *same], strict=True))
    policy.prefixes = None
    whole, plain = seen_by(policy, batch)
    for number, (robot, frame) in enumerate(((0, 2), (1, 10), (0, 4))):
        data = open_dataset(config.datasets[robot])
        (learnt,) = LiveHiddenStates(policy.backbone, data, config.intents).read(np.array([frame]))
        np.testing.assert_allclose(whole[number], learnt, rtol=0, atol=2e-6)
        np.testing.assert_allclose(cached[number], learnt, rtol=0, atol=2e-6)
        np.testing.assert_allclose(actions[number], plain[number], rtol=0, atol=1e-5)
    old = replace(config.intents, prompt="pictures_first")
    (other,) = LiveHiddenStates(policy.backbone, data, old).read(np.array([4]))
    assert len(other) != len(cached[2]) or np.abs(other - cached[2]).max() > 1e-3


def test_the_order_is_recorded(config: PolicyTrainingConfig, trained: Path) -> None:
    stored = read_config(trained)
    assert stored["prompt_order"] == "text_first" and "tap" not in stored
    again = json.loads(json.dumps(CheckpointConfig.from_json(stored).to_json()))
    assert again == {name: value for name, value in stored.items() if name in again}
    del stored["prompt_order"]
    assert CheckpointConfig.from_json(stored).tap == TapConfig(layer=2), "as older checkpoints"
    assert config.cache is not None
    assert json.loads((config.cache / "arm/spec.json").read_text())["prompt_order"] == "text_first"
    backbone = CheckpointPolicy.load(trained).backbone
    versions = [prompt_version(backbone, ("base",), order) for order in ("pictures_first", "text_first")]
    assert versions[0] != versions[1]


def test_another_order_is_refused(config: PolicyTrainingConfig, trained: Path, tmp_path: Path) -> None:
    old = replace(config, intents=replace(config.intents, prompt="pictures_first"))
    with pytest.raises(BlmError, match="is stale: it has another prompt"):
        train_stage2(old, tmp_path / "stale", {})
    with pytest.raises(BlmError, match="prompt of the checkpoint to start from is text_first, here it is"):
        train_stage2(replace(old, start=trained, cache=None), tmp_path / "start", {})
    for make in (HiddenStateConfig, TapConfig):
        more = {"cameras": ("base",)} if make is HiddenStateConfig else {}
        with pytest.raises(BlmError, match=r"'words'.*pictures_first, query_last, text_first"):
            make(layer=1, prompt="words", **more)


def test_a_checkpoint_whose_order_was_edited_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(trained, folder)
    stored = json.loads((folder / "config.json").read_text())
    del stored["prompt_order"]
    (folder / "config.json").write_text(json.dumps(stored))
    (folder / "manifest.json").write_text(json.dumps(checkpoint_module._hashes(folder)))
    with pytest.raises(BlmError, match="was trained with control prompts of version"):
        CheckpointPolicy.load(folder)


def test_training_without_a_cache_reads_the_same_prompts(
    config: PolicyTrainingConfig, trained: Path, tmp_path: Path
) -> None:
    live = train_stage2(replace(config, cache=None), tmp_path / "run", {})
    one, other = CheckpointPolicy.load(live), CheckpointPolicy.load(trained)
    batch = observations(config)
    for a, b in zip(one.act_batch(batch), other.act_batch(batch), strict=True):
        np.testing.assert_allclose(a.actions, b.actions, atol=0.02)  # the cache holds float16


def test_stage_i_and_stage_ii_agree(config: PolicyTrainingConfig, tmp_path: Path) -> None:
    taught = tiny_smol()
    assert taught.taught_prompts == ()
    taught.record_prompts({"pictures_first"})
    taught.save(tmp_path / "backbone")
    config = replace(config, backbone=str(tmp_path / "backbone"), cache=None)
    with pytest.raises(BlmError, match=r"Stage I taught .* in the order pictures_first: use that"):
        train_stage2(config, tmp_path / "run", {})
    again = Backbone.load(tmp_path / "backbone")
    again.record_prompts({"text_first"})
    assert again.taught_prompts == ("pictures_first", "text_first")
    again.require_taught("text_first")


@pytest.mark.parametrize("order", ["pictures_first", "text_first"])
def test_stage_i_trains_on_the_tokens_that_stage_ii_reads(order: PromptOrder, tmp_path: Path) -> None:
    images = {"base": picture(0, 64, 64), "wrist": picture(1, 64, 64)}
    prompt = control_prompt("push it.", "panda", images, order=order)
    messages = (*prompt, Message("assistant", ("next: approach",)))
    row = Conversation(id="a", group="a", source="scene", kinds=("control",), messages=messages)
    corpus = TrainingCorpus(name="scenes", folder=tmp_path, conversations=[row])
    stage1 = Stage1Config(loop=LoopConfig(steps=1, batch_size=1, lr=1e-3))
    backbone, (source,) = prepare_stage1(tiny_smol(), [corpus], stage1, NanoPretrainingConfig(), tmp_path)
    assert backbone.taught_prompts == (order,)
    (one,) = source.conversations
    example = tokenize_conversation(backbone, one, stage1.limits, None, Counter())
    assert example is not None
    read = backbone.read([prompt], side="right")["input_ids"][0].numpy()
    assert np.array_equal(example.tokens[: len(read)], read)
    assert np.flatnonzero(example.loss_mask)[0] == len(read), "the answer follows"


def test_a_template_that_moves_pictures_is_refused(config: PolicyTrainingConfig, tmp_path: Path) -> None:
    moving = tiny_smol()
    moving.processor.chat_template = IMAGES_BEFORE_TEXT
    moving.save(tmp_path / "backbone")
    config = replace(config, backbone=str(tmp_path / "backbone"), cache=None)
    with pytest.raises(BlmError, match=r"family 'llava' with this chat template cannot read .* text_first"):
        train_stage2(config, tmp_path / "run", {})
    with pytest.raises(BlmError, match="moves the pictures in front of the text"):
        moving.record_prompts({"text_first"})
    moving.record_prompts({"pictures_first"})


def test_a_family_without_exact_prefixes_acts_without_them(caplog: pytest.LogCaptureFixture) -> None:
    gemma = FAMILIES["Gemma 3"]()
    with caplog.at_level(logging.WARNING):
        assert TapConfig(layer=1, prompt="text_first").prefix_cache(gemma) is None
    (record,) = caplog.records
    assert "every decision reads its whole prompt" in record.message and "both directions" in record.message
    assert TapConfig(layer=1).prefix_cache(gemma) is None and len(caplog.records) == 1
