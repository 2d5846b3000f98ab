"""Stage II with a backbone that is tuned, and with language co-training."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from blm.app.doctor import examine_path
from blm.backbone.backbone import Backbone
from blm.datasets.lerobot import open_dataset
from blm.policy.checkpoint import read_config
from blm.policy.policy import CheckpointPolicy
from blm.training.loop.loop import LoopConfig
from blm.training.policy.backbone_tuning import BackboneTuning, TunedPolicy, TunedSampler
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.cotraining import LanguageCotraining
from blm.training.policy.hashed_backbone import HashedBackbone
from blm.training.policy.hidden_state_cache import ALONE
from blm.training.policy.hidden_states import HiddenStateConfig, LiveHiddenStates
from blm.training.policy.prompt_features import cache_prompts
from blm.training.policy.train import train_stage2
from blm.training.sft.lora import Lora
from blm.types import BlmError
from tests.support.conversations import write_conversations
from tests.support.hidden_states import make_backbone, make_dataset
from tests.support.policy_training import POLICY

LORA = BackboneTuning(kind="lora", lora=Lora(rank=4), lr=1e-2)
LAST = BackboneTuning(kind="last_blocks", lr=1e-3)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PolicyTrainingConfig:
    folder = tmp_path_factory.mktemp("tuning")
    make_backbone(folder / "backbone")
    for robot, joints in (("arm", 2), ("leg", 3)):
        make_dataset(folder, robot, joints, lengths=(9, 8, 9))
    write_conversations(folder / "words")
    return PolicyTrainingConfig(
        datasets=(folder / "arm", folder / "leg"),
        backbone=str(folder / "backbone"),
        intents=HiddenStateConfig(layer=1, cameras=("base", "wrist"), workers=0, stride=2, shard_frames=7),
        loop=LoopConfig(steps=6, batch_size=8, lr=4e-3, log_every=1, eval_every=3, save_every=2, keep=9),
        policy=POLICY,
        execute=3,
        held_out=0.3,
        validation_batches=1,
        tune=replace(LORA, features=str(folder / "features")),
    )


def cotrained(config: PolicyTrainingConfig) -> PolicyTrainingConfig:
    folder = Path(config.backbone).parent
    return replace(
        config,
        cotrain=LanguageCotraining(weight=0.5, corpora=(str(folder / "words"),), every=2, batch_size=4),
    )


def rows_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    network = load_file(checkpoint / "policy.safetensors")
    return network | load_file(checkpoint / "backbone/model.safetensors")


def test_prompts_with_cached_features_have_the_hidden_states_of_the_images(config, tmp_path):
    from blm.backbone.model import tap_with_gradient
    from blm.training.sft.pack import collate
    from blm.training.sft.vision_features import forward_arguments

    config = replace(config, intents=replace(config.intents, views=1))
    backbone, dataset = Backbone.load(config.backbone), open_dataset(config.datasets[0])
    backbone.freeze()
    hashed = HashedBackbone.of(backbone, config.backbone)
    source = cache_prompts(hashed, dataset, config.intents, tmp_path, ALONE)
    frames, views = np.array([2, 9, 17, 4]), np.array([0, 1, 0, 1])
    expected = LiveHiddenStates(backbone, dataset, config.intents).read(frames, views)
    rows = source.read(frames, views)
    batch = collate(backbone, rows, (0, 1, 2, 3))
    hidden = tap_with_gradient(backbone, forward_arguments(backbone, batch.inputs), 1)
    for got, mask, row in zip(hidden, batch.inputs["attention_mask"].bool(), expected, strict=True):
        torch.testing.assert_close(got[mask].detach(), torch.from_numpy(row), rtol=1e-5, atol=1e-5)


def test_a_cache_of_vision_features_is_opened_only_as_it_was_written(config, tmp_path):
    backbone, dataset = Backbone.load(config.backbone), open_dataset(config.datasets[0])
    backbone.freeze()
    hashed = HashedBackbone.of(backbone, config.backbone)
    frames, views = np.array([2, 9, 17, 4]), np.array([0, 0, 0, 0])

    def fill(folder: Path = tmp_path / "cache", **changes) -> list[dict[str, torch.Tensor]]:
        intents = replace(config.intents, **changes)
        source = cache_prompts(hashed, dataset, intents, folder, ALONE)
        return [
            {name: values for name, (values,) in row.features.read().items()}
            for row in source.read(frames, views)
        ]

    def assert_same(made, wanted) -> None:
        for one, other in zip(made, wanted, strict=True):
            assert one.keys() == other.keys() and one
            for name in one:
                torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5)

    wanted = fill()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert_same(fill(shard_frames=3), wanted)  # the manifest says which frames a file has
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before
    assert_same(fill(tmp_path / "by a worker", workers=1), wanted)
    with pytest.raises(BlmError, match=r"of vision features .* is stale: it has another prompt, cameras"):
        fill(cameras=("base",))
    shard = tmp_path / "cache/00001.safetensors"
    data = shard.read_bytes()
    for damaged in (data[:-1], bytes([*data[:-1], data[-1] ^ 1]), None):
        shard.unlink() if damaged is None else shard.write_bytes(damaged)
        with pytest.raises(BlmError, match=r"of vision features .* 00001\.safetensors is missing or altered"):
            fill()
    shard.write_bytes(data)
    (tmp_path / "cache/manifest.json").unlink()  # killed before the manifest
    assert_same(fill(), wanted)
    spec = json.loads((tmp_path / "cache/spec.json").read_text())
    (tmp_path / "cache/spec.json").write_text(json.dumps({**spec, "format": 2}))
    with pytest.raises(BlmError, match="is stale: it has another format"):
        fill()


@pytest.mark.parametrize("tune", [LORA, LAST], ids=["lora", "last blocks"])
def test_a_tuned_backbone_is_stored_named_and_proven(config, tmp_path, tune):
    config = replace(config, tune=replace(tune, features=config.tune.features))
    checkpoint = train_stage2(config, tmp_path / "run", {})
    before, policy = Backbone.load(config.backbone), CheckpointPolicy.load(checkpoint)
    assert policy.tuning is not None and policy.tuning.before == before.fingerprint()
    assert (policy.tuning.kind, policy.tuning.first_block, policy.tuning.last_block) == (tune.kind, 1, 1)
    assert policy.frozen.weights == policy.backbone.fingerprint() != before.fingerprint()
    changed = {
        name
        for name, value in policy.backbone.model.state_dict().items()
        if not torch.equal(value, before.model.state_dict()[name])
    }
    assert changed and all("language_model.layers.0." in name for name in changed)
    text = policy.tuning.describe()
    assert text in (checkpoint / "README.md").read_text() and "Frozen backbone" not in text
    (check,) = examine_path(checkpoint)
    assert text in check.found and not check.fix
    assert CheckpointPolicy.load(tmp_path / "run/best").tuning == policy.tuning
    weights = checkpoint / "backbone/model.safetensors"
    assert [*load_file(weights)] == [*load_file(Path(config.backbone) / "model.safetensors")]
    assert {"tune", "cotrain"} & read_config(checkpoint)["provenance"]["inputs"].keys() == {"tune"}


def test_a_frozen_run_records_no_tuning(config, tmp_path):
    config = replace(config, tune=BackboneTuning(), loop=replace(config.loop, steps=1))
    checkpoint = train_stage2(config, tmp_path, {})
    stored = read_config(checkpoint)
    assert "tuning" not in stored and not {"tune", "cotrain"} & stored["provenance"]["inputs"].keys()
    assert "## Frozen backbone" in (checkpoint / "README.md").read_text()
    assert not (tmp_path / "features").exists()


def test_the_stored_policy_is_the_average_of_both_parts(config, tmp_path):
    """The merged backbone of the checkpoint taps what the averaged adapters did at the last
    validation."""
    seen = {}

    def validate(step: int, policy: CheckpointPolicy) -> dict[str, float]:
        seen[step] = (policy.contract.revision, policy.backbone.fingerprint())
        return {"success": 1.0 - step / 100}

    checkpoint = train_stage2(config, tmp_path, {}, validate=validate)
    last, best = CheckpointPolicy.load(checkpoint), CheckpointPolicy.load(tmp_path / "best")
    assert (last.contract.revision, last.backbone.fingerprint()) == seen[6]
    assert (best.contract.revision, best.backbone.fingerprint()) == seen[3] != seen[6]
    state = load_file(tmp_path / "state-00000006.safetensors")
    path = "backbone.model/language_model/layers/0/self_attn/q_proj/lora_B/default/weight"
    assert not torch.equal(state[f"ema/{path}"], state[f"weight/{path}"])


def test_the_gradient_is_that_of_a_step_through_images_and_tap(config):
    """Against a slow way: finite differences of the loss, of one adapter weight."""
    from blm.training.policy import backbone_tuning as tuning
    from blm.training.policy.add_robot import from_scratch
    from blm.training.policy.open_data import make_sampler, open_datasets

    backbone = Backbone.load(config.backbone, dtype=torch.float64)
    backbone.freeze()
    start = from_scratch(config.policy, 32, ["arm", "leg"], 0)
    start.network.double()
    datasets = [open_dataset(folder) for folder in config.datasets]
    own = replace(config.tune, features=config.tune.features + "-double")
    double = replace(config, tune=own)
    hashed = HashedBackbone.of(backbone, config.backbone)
    opened = open_datasets(hashed, datasets, double, start, None)
    tuned = tuning.tune_backbone(hashed, 1, own, None, 0)
    module = TunedPolicy(start.network, tuned)
    batch = tuned.sampler(make_sampler(opened, double), language=True)(0)
    actions = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in vars(batch.actions).items()
    }
    batch = replace(batch, actions=type(batch.actions)(**actions))
    losses = module.loss(batch, module)
    losses["loss"].backward()
    weight = next(p for name, p in module.backbone.items() if "q_proj/lora_B" in name)
    assert all((p.grad is not None) == p.requires_grad for p in module.backbone.values())
    flow = []
    index = int(weight.grad.abs().argmax())
    for change in (1e-3, -1e-3):  # norms and rotary positions of the model compute in float32
        with torch.no_grad():
            weight.view(-1)[index] += change
            teacher_free = module.loss(batch, module)
            flow.append(float(teacher_free["loss_flow"]))
            weight.view(-1)[index] -= change
    module.zero_grad()
    module.loss(batch, module)["loss_flow"].backward()
    assert (flow[0] - flow[1]) / 2e-3 == pytest.approx(float(weight.grad.view(-1)[index]), rel=2e-3)


def test_a_killed_tuned_run_continues_to_the_same_bits(config, tmp_path, monkeypatch):
    config = cotrained(replace(config, tune=replace(config.tune, lora=Lora(rank=4, dropout=0.1))))
    whole = train_stage2(config, tmp_path / "whole", {})
    original = TunedSampler.__call__

    def killed(self, step, *part):
        if step == 5:
            raise KeyboardInterrupt
        return original(self, step, *part)

    with monkeypatch.context() as patch:
        patch.setattr(TunedSampler, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            train_stage2(config, tmp_path / "parts", {})
    parts = train_stage2(config, tmp_path / "parts", {})
    for name, value in weights_of(whole).items():
        assert torch.equal(value, weights_of(parts)[name]), name
    rows = rows_of(tmp_path / "whole")
    assert ["loss_language" in row for row in rows] == [True, False] * 3, "in every second step"
    assert CheckpointPolicy.load(parts).tuning.corpora == ("words",)


@pytest.mark.parametrize("change", ["parts", "checkpointing"])
def test_parts_of_a_step_and_checkpointing_change_only_the_rounding(config, tmp_path, change):
    config = cotrained(replace(config, loop=replace(config.loop, steps=2)))
    whole = train_stage2(config, tmp_path / "whole", {})
    if change == "parts":
        other = replace(config, loop=replace(config.loop, accumulate=2))
    else:
        other = replace(config, tune=replace(config.tune, checkpoint_blocks=True))
    train_stage2(other, tmp_path / "other", {})
    for row, same in zip(rows_of(tmp_path / "whole"), rows_of(tmp_path / "other"), strict=True):
        for name in ("loss", "loss_flow", "loss_future", "loss_language", "grad_norm"):
            assert row.get(name, 0) == pytest.approx(same.get(name, 0), rel=1e-4), (row["step"], name)
    assert whole.is_dir()


@pytest.mark.slow
def test_cotraining_lowers_the_language_loss(config, tmp_path):
    config = cotrained(replace(config, loop=replace(config.loop, steps=30, eval_every=0)))
    config = replace(config, cotrain=replace(config.cotrain, weight=5.0, every=1, batch_size=8))
    train_stage2(config, tmp_path, {})
    losses = [row["loss_language"] for row in rows_of(tmp_path)]
    assert np.mean(losses[-3:]) < 0.95 * np.mean(losses[:3])


@pytest.mark.slow
def test_starting_from_a_checkpoint_works_with_tuning_and_keeps_its_record(config, tmp_path):
    one = replace(config, loop=replace(config.loop, steps=1))
    tuned = train_stage2(one, tmp_path / "tuned", {})
    frozen = replace(one, tune=BackboneTuning(), start=tuned, backbone=str(tuned / "backbone"))
    later = CheckpointPolicy.load(train_stage2(frozen, tmp_path / "frozen", {}))
    assert later.tuning == CheckpointPolicy.load(tuned).tuning
    assert later.backbone.fingerprint() == CheckpointPolicy.load(tuned).backbone.fingerprint()
    again = replace(one, tune=LORA, start=tuned, backbone=str(tuned / "backbone"))
    record = CheckpointPolicy.load(train_stage2(again, tmp_path / "again", {})).tuning
    assert record.before == later.backbone.fingerprint()


def test_contradictory_settings_are_refused_by_name(config, tmp_path):
    with pytest.raises(BlmError, match=r"tune.kind is lora, but a hidden-state cache .* leave out --cache"):
        replace(config, cache=tmp_path)
    with pytest.raises(BlmError, match="only_new promises unchanged actions"):
        replace(config, start=tmp_path, only_new=True)
    with pytest.raises(BlmError, match="does not support sharded weights"):
        replace(config, loop=replace(config.loop, shard=True))
    with pytest.raises(BlmError, match="the backbone is frozen, so a language loss would train nothing"):
        replace(cotrained(config), tune=BackboneTuning())
    with pytest.raises(BlmError, match=r"without cotrain.corpora"):
        replace(config, cotrain=LanguageCotraining(weight=1.0))
    with pytest.raises(BlmError, match=r"cotrain.weight is 0"):
        replace(config, cotrain=LanguageCotraining(corpora=(str(tmp_path),)))
    with pytest.raises(BlmError, match=r"tune.lora.rank is 0"):
        BackboneTuning(kind="lora", lora=Lora())
    with pytest.raises(BlmError, match=r"tune.blocks is 2, but the tap is after block 1"):
        train_stage2(replace(config, tune=replace(LAST, blocks=2)), tmp_path / "deep", {})
    with pytest.raises(BlmError, match=r"lora.targets \['nothing'\]"):
        bad = replace(LORA, lora=Lora(rank=2, targets=("nothing",)))
        train_stage2(replace(config, tune=bad), tmp_path / "targets", {})
