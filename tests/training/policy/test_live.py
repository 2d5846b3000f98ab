"""Live training of Stage II: prompts from workers, hidden states on the device."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from blm.backbone import Backbone, control_prompt
from blm.datasets.lerobot import open_dataset
from blm.policy.policy import CheckpointPolicy
from blm.training.loop.batches import ByWorkers, open_batches
from blm.training.loop.distributed import DataShard
from blm.training.loop.loop import LoopConfig
from blm.training.policy.add_robot import from_scratch
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hashed_backbone import HashedBackbone
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.policy.live import LiveBatch, LiveBatches, PromptReader, open_live
from blm.training.policy.open_data import make_sampler, open_datasets
from blm.training.policy.sampler import PolicyDataset
from blm.training.policy.train import train_stage2
from blm.types import BlmError
from tests.support.backbones import MAKERS
from tests.support.hidden_states import make_backbone, make_dataset
from tests.support.policy_training import POLICY

TEXTS = [("reach the dot", "arm"), ("go to the bright dot now", "leg"), ("reach the dot", "arm")]
PARTS = [DataShard(0, 2), DataShard(1, 2)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PolicyTrainingConfig:
    folder = tmp_path_factory.mktemp("live")
    make_backbone(folder / "backbone")
    for robot, joints in (("arm", 2), ("leg", 3)):
        make_dataset(folder, robot, joints)
    return PolicyTrainingConfig(
        datasets=(folder / "arm", folder / "leg"),
        backbone=str(folder / "backbone"),
        intents=HiddenStateConfig(layer=1, cameras=("base", "wrist"), batch_size=8, workers=0, views=1),
        loop=LoopConfig(steps=4, batch_size=12, lr=4e-3, log_every=1, save_every=2),
        policy=POLICY,
        execute=3,
        held_out=0.3,
        validation_batches=1,
    )


def opened(config: PolicyTrainingConfig) -> tuple[Backbone, list[PolicyDataset]]:
    backbone = Backbone.load(config.backbone)
    datasets = [open_dataset(folder) for folder in config.datasets]
    start = from_scratch(POLICY, 32, ["arm", "leg"], 0)
    hashed = HashedBackbone.of(backbone, config.backbone)
    return backbone, open_datasets(hashed, datasets, config, start, None)


def live_batches(config: PolicyTrainingConfig) -> LiveBatches:
    backbone, datasets = opened(config)
    plain = [replace(one, hidden_states=None) for one in datasets]
    reader = open_live(backbone, config.backbone, datasets, config.intents).reader
    return LiveBatches(make_sampler(plain, config), reader, config.intents)


def tensors(batch: LiveBatch) -> dict[str, Tensor]:
    found = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    for number, part in enumerate(batch.prompts):
        found |= {f"{number} {name}": value for name, value in part.inputs.items()}
        found |= {} if part.pictures is None else {f"{number} pictures": part.pictures}
    return found


@pytest.mark.parametrize(("name", "side"), [(name, 56) for name in MAKERS] + [("qwen3", 64), ("nano", 112)])
def test_a_reader_in_another_process_gives_the_inputs_of_the_processor(
    name: str, side: int, tmp_path: Path
) -> None:
    MAKERS[name]().save(tmp_path / "backbone")
    backbone = Backbone.load(tmp_path / "backbone")
    dataset = type("Dataset", (), {"image_size": side, "instructions": tuple(text for text, _ in TEXTS)})()
    dataset.space = type("Space", (), {"robot": "arm"})()
    cameras = ("base", "wrist")
    one: Any = type("One", (), {"dataset": dataset})()
    live = open_live(backbone, str(tmp_path / "backbone"), [one], HiddenStateConfig(layer=1, cameras=cameras))
    assert live.reader.by_map == ((name, side) in [("qwen2.5", 56), ("qwen3", 64), ("nano", 112)])
    copy: PromptReader = ForkingPickler.loads(ForkingPickler.dumps(live.reader))
    assert copy.backbone.model.device.type == "meta"
    rng = np.random.default_rng(3)
    pictures = [
        {camera: rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for camera in cameras} for _ in TEXTS
    ]
    prompts = [control_prompt(*text, views) for text, views in zip(TEXTS, pictures, strict=True)]
    own = backbone.read(prompts, side="right")
    found = live.tap.inputs(copy.read(TEXTS, pictures))
    plain = backbone.tap(own, 1).hidden
    if positions := found.keys() - own.keys():
        assert positions == {"position_ids"}
    mask = own["attention_mask"].bool()
    assert torch.equal(backbone.tap(found, 1).hidden[mask], plain[mask]), "with the positions of the model"
    assert own.keys() <= found.keys()
    assert all(torch.equal(found[key], own[key]) for key in own)


def test_live_batches_hold_the_hidden_states_of_a_direct_tap(config: PolicyTrainingConfig) -> None:
    backbone, datasets = opened(config)
    make, slow = live_batches(config), make_sampler(datasets, config)
    tap = open_live(backbone, config.backbone, datasets, config.intents).tap
    for step, shard in ((0, DataShard()), (3, PARTS[1])):
        made, wanted = make(step, shard), slow(step, shard)
        batch = tap(made.batch)
        assert made.ids == wanted.ids == batch.ids and made.weight == len(wanted.ids)
        for name, value in vars(wanted).items():
            if isinstance(value, Tensor) and "hidden" not in name and "mask" not in name:
                assert torch.equal(getattr(batch, name), value), name
        for hidden, mask in (("hidden", "mask"), ("future_hidden", "future_mask")):
            assert (getattr(batch, hidden)[~getattr(batch, mask)] == 0).all()
            for i, row in enumerate(getattr(wanted, mask)):
                got = getattr(batch, hidden)[i][getattr(batch, mask)[i]]
                torch.testing.assert_close(got, getattr(wanted, hidden)[i][row], rtol=1e-4, atol=1e-4)


def test_a_frame_that_two_samples_need_is_prepared_once(config: PolicyTrainingConfig) -> None:
    many = replace(config, loop=replace(config.loop, batch_size=64), intents=replace(config.intents, views=0))
    made = live_batches(many)(0).batch
    count = sum(len(part.inputs["input_ids"]) for part in made.prompts)
    frames = live_batches(many).sampler.sample(0)
    later = live_batches(many).sampler.future_frames(frames)
    keys = {*zip(frames.datasets, frames.frames, strict=True), *zip(frames.datasets, later, strict=True)}
    assert count == len(keys) < 100 and int(torch.cat([made.now, made.future]).max()) == count - 1


def test_batches_are_equal_with_any_number_of_workers(config: PolicyTrainingConfig) -> None:
    make = live_batches(config)
    found = []
    for workers in (0, 1, 2):
        with open_batches(ByWorkers(make, workers), range(1, 4), PARTS) as batches:
            found.append([tensors(one.batch) for step, _ in batches for one in step])
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_trained_weights_are_equal_with_workers_and_after_an_interruption(
    config: PolicyTrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {}

    def save(self: CheckpointPolicy, folder: Path, facts: Any, *, proved: bool = False) -> None:
        if folder.name == "checkpoint":
            weights[folder.parent.name] = [*self.network.state_dict().values()]

    monkeypatch.setattr(CheckpointPolicy, "save", save)
    for workers in (0, 2):
        intents = replace(config.intents, workers=workers)
        train_stage2(replace(config, intents=intents), tmp_path / str(workers), {})
    read = LiveBatches.__call__

    def interrupted(self: LiveBatches, step: int, shard: DataShard) -> Any:
        if step == 3:
            raise BlmError("interrupted")
        return read(self, step, shard)

    with monkeypatch.context() as patch, pytest.raises(BlmError, match="interrupted"):
        patch.setattr(LiveBatches, "__call__", interrupted)
        train_stage2(config, tmp_path / "resumed", {})
    train_stage2(replace(config, intents=replace(config.intents, workers=1)), tmp_path / "resumed", {})
    for name in ("2", "resumed"):
        assert all(torch.equal(a, b) for a, b in zip(weights["0"], weights[name], strict=True)), name


def test_a_frame_that_cannot_be_read_is_named(config: PolicyTrainingConfig, tmp_path: Path) -> None:
    make_dataset(tmp_path, "arm", 2)
    one = replace(config, datasets=(tmp_path / "arm",))
    make = live_batches(one)
    for video in (tmp_path / "arm").rglob("*.mp4"):
        video.write_bytes(video.read_bytes()[:2000])
    with pytest.raises(BlmError, match=r"sample '.*/arm', frame \d+ cannot be prepared: video '.*mp4'"):
        make(0)
