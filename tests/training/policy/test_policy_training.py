import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from blm.backbone.backbone import Backbone
from blm.datasets.lerobot import open_dataset
from blm.policy.checkpoint import read_config
from blm.policy.network import PolicyNetwork
from blm.policy.policy import CheckpointPolicy
from blm.training.loop.distributed import DataShard
from blm.training.loop.loop import LoopConfig
from blm.training.policy import train as policy_training
from blm.training.policy.add_robot import from_scratch
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hashed_backbone import HashedBackbone
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.policy.open_data import make_sampler, open_datasets
from blm.training.policy.sampler import PolicyDataset, PolicySampler, split
from blm.training.policy.train import train_stage2
from blm.types import BlmError, Observation
from tests.support.hidden_states import make_backbone, make_dataset
from tests.support.policy_training import POLICY


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PolicyTrainingConfig:
    folder = tmp_path_factory.mktemp("stage2")
    make_backbone(folder / "backbone")
    for robot, joints in (("arm", 2), ("leg", 3)):
        make_dataset(folder, robot, joints)
    return PolicyTrainingConfig(
        datasets=(folder / "arm", folder / "leg"),
        backbone=str(folder / "backbone"),
        intents=HiddenStateConfig(layer=1, cameras=("base",), workers=0, stride=2),
        loop=LoopConfig(steps=120, batch_size=16, lr=4e-3, log_every=20),
        policy=POLICY,
        cache=folder / "cache",
        execute=3,
        held_out=0.3,
        validation_batches=2,
    )


def robots_of(config: PolicyTrainingConfig) -> list[PolicyDataset]:
    start = from_scratch(config.policy, 32, ["arm", "leg"], 0)
    datasets = [open_dataset(folder) for folder in config.datasets]
    hashed = HashedBackbone.of(Backbone.load(config.backbone), config.backbone)
    return open_datasets(hashed, datasets, config, start, None)


def test_losses_from_the_cache_equal_those_without_within_half_precision(config):
    torch.manual_seed(0)
    network = PolicyNetwork(POLICY, 32, 2)
    cached, live = (make_sampler(robots_of(c), c) for c in (config, replace(config, cache=None)))
    for step in (0, 5):
        a, b = cached(step), live(step)
        for name in ("mask", "future_mask", "state", "actions", "real", "embodiment", "noise", "tau"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.hidden.dtype == torch.float16 and b.hidden.dtype == torch.float32
        for name, value in network.loss(a, network).items():
            torch.testing.assert_close(value, network.loss(b, network)[name], rtol=2e-3, atol=2e-4)


def test_a_batch_has_the_data_of_its_frames(config):
    robots = robots_of(config)
    batch = make_sampler(robots, config)(3)
    again = make_sampler(robots, config)(3)
    assert torch.equal(batch.noise, again.noise) and batch.ids == again.ids
    assert not torch.equal(batch.noise, make_sampler(robots, config)(4).noise)
    names = [str(robot.dataset.folder) for robot in robots]
    for i, (name, frame) in enumerate(batch.ids):
        robot = robots[names.index(name)]
        data, e = robot.dataset, robot.dataset.episode_index[frame]
        assert (
            batch.embodiment[i] == names.index(name) and frame in robot.train and frame not in robot.held_out
        )
        inside = min(6, data.starts[e + 1] - frame)
        assert batch.real[i].sum() == inside * data.space.dim
        assert batch.real[i, :inside, : data.space.dim].all()
        there = batch.actions[i, :, : data.space.dim].double().numpy()
        undone = robot.transforms.actions.inverse(there, data.states[frame])
        np.testing.assert_allclose(undone[:inside], data.actions[frame : frame + inside], atol=1e-5)
        later = robot.hidden_states.read(np.array([min(frame + 6, data.starts[e + 1] - 1)]))[0]
        assert torch.equal(batch.future_hidden[i][batch.future_mask[i]], torch.from_numpy(np.array(later)))


def test_state_noise_is_drawn_for_training_frames_and_real_dimensions_only(config):
    noisy = replace(config, policy=replace(POLICY, state_noise=0.5))
    robots = robots_of(config)
    plain, other = (make_sampler(robots, c)(3) for c in (config, noisy))
    noise = other.state - plain.state
    assert torch.equal(noise != 0, other.real[:, 0])
    assert noise[other.real[:, 0]].std() == pytest.approx(0.5, rel=0.3)
    for name in ("actions", "noise", "tau", "hidden"):
        assert torch.equal(getattr(plain, name), getattr(other, name)), name
    parts = [make_sampler(robots, noisy)(3, DataShard(index, 2)).state for index in range(2)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), other.state)
    held = [make_sampler(robots, c, train=False)(3).state for c in (config, noisy)]
    assert torch.equal(*held)


def test_a_killed_run_with_dropout_and_noise_continues_to_the_same_checkpoint(config, tmp_path, monkeypatch):
    policy = replace(POLICY, dropout=0.2, state_noise=0.1)
    config = replace(config, policy=policy, loop=replace(config.loop, steps=6, save_every=2))
    whole, parts = resumed_after_a_kill(config, tmp_path, monkeypatch, at=5)
    assert (whole / "policy.safetensors").read_bytes() == (parts / "policy.safetensors").read_bytes()


def test_the_parts_of_a_step_are_the_samples_of_the_whole(config):
    torch.manual_seed(0)
    network, sampler = PolicyNetwork(POLICY, 32, 2), make_sampler(robots_of(config), config)
    whole = sampler(3)
    parts = [sampler(3, DataShard(index, 3)) for index in range(3)]
    for index, part in enumerate(parts):
        assert part.ids == whole.ids[index::3] and torch.equal(part.noise, whole.noise[index::3])
    assert {len(part.ids) for part in parts} == {5, 6}
    for name, value in network.loss(whole, network).items():
        added = sum(network.loss(part, network)[name] * len(part.ids) for part in parts) / 16
        torch.testing.assert_close(added, value, rtol=1e-4, atol=1e-5)


def test_weights_determine_sampling_frequencies(config):
    robots = robots_of(config)

    def legs(**weights: float) -> float:
        sampler = make_sampler(robots, replace(config, weights=weights))
        return np.mean([Path(folder).name == "leg" for step in range(40) for folder, _ in sampler(step).ids])

    even = len(robots[1].train) / (len(robots[0].train) + len(robots[1].train))
    assert legs() == pytest.approx(even, abs=0.06)
    assert legs(leg=3.0) == pytest.approx(3 * even / (1 + 2 * even), abs=0.06)
    assert legs(arm=0.0) == 1.0 and legs(leg=0.0) == 0.0
    with pytest.raises(BlmError, match=r"weights for \['foot'\], which no dataset contains; valid: arm, leg"):
        legs(foot=2.0)


def test_statistics_come_from_training_episodes_only(config):
    robot = robots_of(config)[0]
    dataset = robot.dataset
    held = np.unique(dataset.episode_index[robot.held_out])
    assert len(held) == 1 and not set(held) & set(dataset.episode_index[robot.train])
    poisoned = np.where(np.isin(dataset.episode_index, held)[:, None], 99.0, dataset.actions)
    (other,) = open_datasets(
        HashedBackbone.of(Backbone.load(config.backbone), config.backbone),
        [replace(dataset, actions=poisoned)],
        replace(config, cache=None),
        from_scratch(config.policy, 32, ["arm"], 0),
        codec=None,
    )
    assert other.transforms.to_json() == robot.transforms.to_json()


def test_training_without_held_out_frames_warns_and_finishes(config, tmp_path, capsys):
    make_dataset(tmp_path, "arm", 2, lengths=(31, 26), tasks=("reach", "wave"))
    dataset = open_dataset(tmp_path / "arm")
    few = replace(
        config, datasets=(tmp_path / "arm",), cache=None, loop=replace(config.loop, steps=2, log_every=1)
    )
    (robot,) = split([dataset], POLICY, stride=2, held_out=0.3, seed=few.loop.seed, robots=["arm"])
    (held,) = {dataset.tasks[i] for i in dataset.episode_index[robot.held_out]}
    few = replace(few, weights={held: 0.0})
    assert train_stage2(few, tmp_path / "run", {}).is_dir()
    assert "so there is no validation loss" in " ".join(capsys.readouterr().err.split())
    assert "val_" not in (tmp_path / "run/log.jsonl").read_text() and not (tmp_path / "run/best").exists()
    with pytest.raises(BlmError, match="nothing to train on"):
        train_stage2(replace(few, weights={"arm": 0.0}), tmp_path / "none", {})


def test_several_datasets_of_a_robot_share_its_row_and_its_transforms(config, tmp_path):
    make_dataset(tmp_path, "arm", 2, lengths=(31, 26))
    both = replace(
        config, datasets=(*config.datasets, tmp_path / "arm"), cache=tmp_path / "cache", held_out=0.0
    )
    demonstrations, leg, more = robots = robots_of(both)
    assert [robot.embodiment for robot in robots] == [0, 1, 0]
    assert sorted(path.name for path in both.cache.iterdir()) == ["arm", "arm-2", "leg"]
    assert demonstrations.transforms is more.transforms is not leg.transforms
    states = np.concatenate([robot.dataset.states[robot.train] for robot in (demonstrations, more)])
    np.testing.assert_allclose(
        demonstrations.transforms.state.low[:-1], np.quantile(states, 0.002, axis=0)[:-1], rtol=1e-6
    )
    sampler = make_sampler(robots, both)
    drawn = [folder for step in range(60) for folder, _ in sampler(step).ids]
    frames = [len(robot.train) for robot in robots]
    for robot, count in zip(robots, frames, strict=True):
        share = drawn.count(str(robot.dataset.folder)) / len(drawn)
        assert share == pytest.approx(count / sum(frames), abs=0.06)


def resumed_after_a_kill(config, folder, monkeypatch, *, at: int) -> tuple[Path, Path]:
    """Return the checkpoints of a whole run, and of one that was killed before step `at`."""
    whole = train_stage2(config, folder / "whole", {})
    original = PolicySampler.__call__

    def killed(self, step, part):
        if step == at:
            raise KeyboardInterrupt
        return original(self, step, part)

    with monkeypatch.context() as patch:
        patch.setattr(PolicySampler, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            train_stage2(config, folder / "parts", {})
    return whole, train_stage2(config, folder / "parts", {})


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert train_stage2(config, out, {"command": "test"}) == out / "checkpoint"
    return out


def test_stage_two_learns_both_robots_and_does_not_change_the_backbone(config, trained):
    rows = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40, 60, 80, 100, 120]
    assert (
        rows[-1]["loss_flow"] < 0.5 * rows[0]["loss_flow"]
        and rows[-1]["loss_future"] < rows[0]["loss_future"]
    )
    assert {"val_loss_flow", "val_loss_future"} <= rows[-1].keys()
    policy = CheckpointPolicy.load(trained / "checkpoint")
    assert policy.backbone.fingerprint() == Backbone.load(config.backbone).fingerprint()
    assert policy.contract.execute == 3 and list(policy.contract.action_spaces) == ["arm", "leg"]
    stored = json.loads((trained / "checkpoint/config.json").read_text())["provenance"]
    assert stored["command"] == "test" and stored["loop"]["seed"] == 0
    for folder in config.datasets:
        data = open_dataset(folder)
        frame = 3
        observation = Observation(
            images={"base": data.frames([frame], "base")[0]},
            state=data.states[frame],
            instruction=data.instructions[data.task_index[frame]],
            robot=data.space.robot,
        )
        error = np.abs(policy.act(observation).actions - data.actions[frame : frame + 6])
        assert error.mean() < 0.15, "joints move up to 0.75 rad in these six steps"


def test_the_contract_tells_how_the_scenes_of_both_stages_varied(config):
    datasets = [open_dataset(folder) for folder in config.datasets]
    backbone = Backbone.load(config.backbone)
    for recorded, told in (("unknown", "unknown"), ("plain", "unknown"), ("randomized", "randomized")):
        backbone.record_training([recorded])
        assert policy_training._contract(backbone, datasets, config).training == told


def test_a_finished_run_is_not_repeated_and_other_inputs_are_refused(config, trained):
    before = (trained / "checkpoint/policy.safetensors").read_bytes()
    train_stage2(config, trained, {"command": "again"})
    assert (trained / "checkpoint/policy.safetensors").read_bytes() == before
    with pytest.raises(BlmError, match="holds another run: it has another weights;"):
        train_stage2(replace(config, weights={"leg": 2.0}), trained, {})


def test_a_killed_run_continues_to_the_same_checkpoint(config, tmp_path, monkeypatch):
    config = replace(config, loop=replace(config.loop, steps=12, save_every=5))
    whole, parts = resumed_after_a_kill(config, tmp_path, monkeypatch, at=8)
    assert (whole / "policy.safetensors").read_bytes() == (parts / "policy.safetensors").read_bytes()


def test_the_best_checkpoint_is_that_of_the_best_evaluation(config, tmp_path):
    config = replace(config, loop=replace(config.loop, steps=12, eval_every=3, save_every=3))
    scores, seen = iter([0.2, 0.8, 0.5, 0.8]), []

    def validate(step: int, policy: CheckpointPolicy) -> dict[str, float]:
        seen.append((step, policy.contract.revision))
        if len(seen) == 4 and len({step for step, _ in seen}) == 4:
            raise KeyboardInterrupt
        return {"success": next(scores)}

    with pytest.raises(KeyboardInterrupt):
        train_stage2(config, tmp_path, {}, validate=validate)
    train_stage2(config, tmp_path, {}, validate=validate)
    revisions = dict(seen)
    assert [step for step, _ in seen] == [3, 6, 9, 12, 12]
    assert CheckpointPolicy.load(tmp_path / "best").contract.revision == revisions[6], "of equals the first"
    assert CheckpointPolicy.load(tmp_path / "checkpoint").contract.revision == revisions[12]
    stored = json.loads((tmp_path / "best/config.json").read_text())["provenance"]
    assert (stored["step"], stored["score"]) == ("6", "0.8")


def test_without_closed_loop_validation_the_loss_selects(config, trained):
    rows = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    stored = json.loads((trained / "best/config.json").read_text())["provenance"]
    assert stored["step"] == "120" and float(stored["score"]) == -rows[-1]["val_loss_flow"]


def acts(checkpoint: Path, folder: Path) -> np.ndarray:
    """What a checkpoint does at the fourth frame of a dataset."""
    data = open_dataset(folder)
    observation = Observation(
        images={"base": data.frames([3], "base")[0]},
        state=data.states[3],
        instruction=data.instructions[data.task_index[3]],
        robot=data.space.robot,
    )
    return CheckpointPolicy.load(checkpoint).act(observation).actions


def test_a_further_robot_is_new_rows_and_nothing_else(config, trained, tmp_path):
    make_dataset(tmp_path, "tail", 3)
    grown = replace(
        config,
        datasets=(tmp_path / "tail",),
        start=trained / "checkpoint",
        only_new=True,
        loop=replace(config.loop, steps=60),
    )
    made = train_stage2(grown, tmp_path / "run", {})
    origin = read_config(trained / "checkpoint")["provenance"]
    assert read_config(made)["provenance"]["start"] == origin and "start" not in origin
    before, after = (load_file(folder / "policy.safetensors") for folder in (trained / "checkpoint", made))
    rows = {name for name, value in before.items() if after[name].shape != value.shape}
    assert rows and all("first" in name or "second" in name or "third" in name for name in rows)
    for name, value in before.items():
        assert torch.equal(after[name][:2] if name in rows else after[name], value), name
    assert list(CheckpointPolicy.load(made).contract.action_spaces) == ["arm", "leg", "tail"]
    for folder in config.datasets:
        np.testing.assert_allclose(acts(made, folder), acts(trained / "checkpoint", folder), atol=1e-6)
    data = open_dataset(tmp_path / "tail")
    assert np.abs(acts(made, tmp_path / "tail") - data.actions[3:9]).mean() < 0.2


def test_a_policy_adapts_to_another_backbone(config, trained, tmp_path):
    other = Backbone.load(config.backbone)
    with torch.no_grad():
        for value in other.model.parameters():
            value.mul_(1.05)
    other.save(tmp_path / "backbone")
    moved = replace(
        config,
        start=trained / "checkpoint",
        backbone=str(tmp_path / "backbone"),
        cache=tmp_path / "cache",
        loop=replace(config.loop, steps=20),
    )
    with pytest.raises(BlmError, match="is not the frozen one"):
        train_stage2(moved, tmp_path / "run", {})
    made = train_stage2(replace(moved, new_backbone=True), tmp_path / "run", {})
    assert CheckpointPolicy.load(made).backbone.fingerprint() == Backbone.load(moved.backbone).fingerprint()
    assert read_config(made)["provenance"]["inputs"]["new_backbone"] is True
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    first = json.loads((trained / "log.jsonl").read_text().splitlines()[0])
    assert rows[0]["loss_flow"] < 0.7 * first["loss_flow"], "the checkpoint's weights are worth something"
    with pytest.raises(BlmError, match="new_backbone needs a checkpoint"):
        replace(config, new_backbone=True)
    with pytest.raises(BlmError, match="new_backbone needs a checkpoint"):
        replace(moved, new_backbone=True, only_new=True)


def test_a_start_that_does_not_fit_is_refused(config, trained):
    go_on = replace(config, start=trained / "checkpoint")
    with pytest.raises(BlmError, match="only_new needs a checkpoint"):
        replace(config, only_new=True)
    with pytest.raises(BlmError, match=r"the checkpoint has \['arm', 'leg'\]"):
        train_stage2(replace(go_on, only_new=True), trained.parent / "none", {})
    with pytest.raises(BlmError, match=r"layer of the checkpoint to start from is 1, here it is 2"):
        train_stage2(replace(go_on, intents=replace(config.intents, layer=2)), trained.parent / "none", {})
    with pytest.raises(BlmError, match="policy of the checkpoint to start from"):
        train_stage2(replace(go_on, policy=replace(POLICY, width=64)), trained.parent / "none", {})
    assert not (trained.parent / "none").exists()


@pytest.mark.parametrize("cached", [True, False])
def test_a_backbone_that_changes_during_stage_two_is_noticed(config, tmp_path, monkeypatch, cached):
    backbone = Backbone.load(config.backbone)
    backbone.save(tmp_path / "backbone")
    config = replace(config, backbone=str(tmp_path / "backbone"), cache=config.cache if cached else None)

    def disturb(model: torch.nn.Module) -> None:
        next(model.parameters()).data.flatten()[0] += 1e-3

    def run(network, ema, datasets, config, out, validate):
        if cached:
            disturb(backbone.model)
            backbone.save(tmp_path / "backbone")
        else:
            disturb(datasets[0].hidden_states.backbone.model)

    monkeypatch.setattr(policy_training, "run_policy_loop", run)
    with pytest.raises(BlmError, match=r"after Stage II: the backbone .* is not the frozen one"):
        train_stage2(config, tmp_path / "out", {})
    assert not (tmp_path / "out/checkpoint").exists()


def test_inconsistent_settings_are_refused(config, tmp_path):
    with pytest.raises(BlmError, match=r"each only once; got \['.*arm', '.*arm'\]"):
        train_stage2(replace(config, datasets=config.datasets[:1] * 2), tmp_path, {})
    with pytest.raises(BlmError, match="lacks top"):
        train_stage2(replace(config, intents=replace(config.intents, cameras=("top",))), tmp_path, {})
    with pytest.raises(BlmError, match="'leg' has 4 dimensions"):
        train_stage2(replace(config, policy=replace(POLICY, max_dim=3)), tmp_path, {})
    with pytest.raises(BlmError, match=r"policy.horizon 30 is longer than the longest .*/arm', 22 steps"):
        train_stage2(replace(config, policy=replace(POLICY, horizon=30)), tmp_path, {})
    with pytest.raises(BlmError, match=r"stride 4 .* must divide future_steps = 6"):
        replace(config, intents=replace(config.intents, stride=4))
    with pytest.raises(BlmError, match=r"execute 7 must lie in 1\.\.horizon = 6"):
        replace(config, execute=7)
