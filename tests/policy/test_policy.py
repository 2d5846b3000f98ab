import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blm import bridge as bridge_module
from blm.app.policies import load_checkpoint
from blm.backbone.backbone import Backbone
from blm.backbone.nano.model import make_nano
from blm.policy import checkpoint as checkpoint_module
from blm.policy import codec, flow
from blm.policy.checkpoint import with_hashes
from blm.policy.heads import IndexedLinear, runs_of, with_embodiments
from blm.policy.network import PolicyBatch, PolicyNetwork
from blm.policy.policy import CheckpointPolicy, RealTimeChunkingPolicy
from blm.serving.app import create_app
from blm.types import ActionChunk, BlmError, Message, Policy
from tests.support.policies import CONFIG, DIMS, make_observation, make_policy

HIDDEN = 12


def make_network(seed: int = 0) -> PolicyNetwork:
    torch.manual_seed(seed)
    return PolicyNetwork(CONFIG, HIDDEN, len(DIMS))


def make_batch(size: int = 8, seed: int = 0) -> PolicyBatch:
    g = torch.Generator().manual_seed(seed)
    embodiment = torch.arange(size) % 2
    dims = torch.arange(CONFIG.max_dim) < torch.tensor(DIMS)[embodiment, None]
    lengths = torch.randint(2, 8, (size, 1), generator=g)
    steps = torch.randint(2, CONFIG.horizon + 1, (size, 1), generator=g)
    real = dims[:, None] & (torch.arange(CONFIG.horizon) < steps)[..., None]
    shape = (size, CONFIG.horizon, CONFIG.max_dim)
    return PolicyBatch(
        hidden=torch.randn(size, 7, HIDDEN, generator=g),
        mask=torch.arange(7) < lengths,
        future_hidden=torch.randn(size, 7, HIDDEN, generator=g),
        future_mask=torch.arange(7) < lengths,
        state=torch.randn(size, CONFIG.max_dim, generator=g) * dims,
        actions=torch.randn(shape, generator=g).clamp(-1, 1) * real,
        real=real,
        embodiment=embodiment,
        noise=torch.randn(shape, generator=g),
        tau=flow.sample_time(size, g),
    )


def sample(network: PolicyNetwork, batch: PolicyBatch, noise: torch.Tensor) -> torch.Tensor:
    dims = batch.real.any(1)
    return network.sample(batch.hidden, batch.mask, batch.state, batch.embodiment, noise, dims)


# --- flow -------------------------------------------------------------------------------------------------


def test_path_ends_at_noise_and_data_and_its_derivative_is_the_target():
    g = torch.Generator().manual_seed(0)
    actions, noise = torch.randn(2, 4, 3, 2, generator=g, dtype=torch.float64).unbind(0)
    zero, one = torch.zeros(4), torch.ones(4)
    torch.testing.assert_close(flow.interpolate(actions, noise, zero), noise)
    torch.testing.assert_close(flow.interpolate(actions, noise, one), actions)
    tau, h = torch.rand(4, generator=g, dtype=torch.float64), 1e-4
    slope = flow.interpolate(actions, noise, tau + h) - flow.interpolate(actions, noise, tau - h)
    torch.testing.assert_close(slope / (2 * h), flow.target(actions, noise))


def test_flow_times_have_their_closed_form_moments():
    tau = flow.sample_time(200_000, torch.Generator().manual_seed(0))
    assert tau.min() == 0 and tau.max() < 1
    assert tau.mean() == pytest.approx(1 - 0.6 / 0.999, abs=2e-3)  # E u = a / (a + 1) = 0.6
    u_half = (1 - 0.5) * 0.999
    assert (tau < 0.5).float().mean() == pytest.approx(1 - u_half**1.5, abs=5e-3)  # P(u > x) = 1 - x^a
    assert (tau < 0.25).sum() > 2 * (tau > 0.75).sum()


def test_euler_integrates_a_constant_velocity_exactly():
    velocity, noise = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 0.25]])
    for steps in (1, 4):
        assert torch.equal(flow.euler(lambda x, tau: velocity, noise, steps), noise + velocity)


def test_euler_recovers_a_gaussian_from_its_exact_velocity_field():
    """For A ~ N(m, s^2): E[A - eps | A^tau = x] = m + (tau s^2 - (1 - tau)) / var(tau) * (x - tau m),
    var(tau) = tau^2 s^2 + (1 - tau)^2, and the flow maps eps to m + s eps."""
    m, s = 1.5, 0.3

    def velocity(x, tau_B):
        tau = tau_B[:, None]
        return m + (tau * s**2 - (1 - tau)) / (tau**2 * s**2 + (1 - tau) ** 2) * (x - tau * m)

    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    actions = flow.euler(velocity, noise, 400)
    torch.testing.assert_close(actions, m + s * noise, atol=0.02, rtol=0)
    assert actions.mean() == pytest.approx(m, abs=0.01) and actions.std() == pytest.approx(s, abs=0.01)


def test_seeded_noise_depends_on_its_own_seed_alone():
    a, b = flow.seeded_noise([3, 4], (5, 2)), flow.seeded_noise([9, 4, 3], (5, 2))
    assert torch.equal(a[0], b[2]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], a[1])


# --- heads ------------------------------------------------------------------------------------------------


def test_indexed_linear_is_one_linear_layer_per_embodiment():
    torch.manual_seed(0)
    layer, x, index = IndexedLinear(3, 4, 5), torch.randn(6, 2, 4), torch.tensor([2, 0, 1, 1, 0, 2])
    slow = torch.stack([x[i] @ layer.weight[e] + layer.bias[e] for i, e in enumerate(index)])
    torch.testing.assert_close(layer(x, index), slow)


@pytest.mark.parametrize("rows", [[0, 0, 1, 1, 1, 3], [2, 0, 1, 1, 0, 2], [1]])
def test_samples_grouped_by_robot_give_the_results_and_gradients_of_gathered_weights(rows):
    """Sorted or not; robots without a sample get gradients of zero, not none."""
    torch.manual_seed(0)
    layer, x = IndexedLinear(4, 4, 5).double(), torch.randn(len(rows), 3, 4, dtype=torch.float64)
    slope, results = torch.randn(len(rows), 3, 5, dtype=torch.float64), []
    for index in (torch.tensor(rows), runs_of(rows)):
        layer.zero_grad()
        own = x.clone().requires_grad_()
        out = layer(own, index)
        (out * slope).sum().backward()
        results.append((out, own.grad, layer.weight.grad, layer.bias.grad))
    for gathered, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, gathered, rtol=1e-12, atol=1e-12)


def test_a_further_arm_is_new_rows_and_nothing_else():
    network, batch = make_network(), make_batch()
    grown = with_embodiments(network, 1)
    old, new = network.state_dict(), grown.state_dict()
    assert old.keys() == new.keys()
    indexed = {
        f"{name}.{kind}"
        for name, layer in network.named_modules()
        if isinstance(layer, IndexedLinear)
        for kind in ("weight", "bias")
    }
    for name, value in old.items():
        assert new[name].shape[1:] == value.shape[1:]
        assert len(new[name]) == len(value) + (name in indexed)
        assert torch.equal(new[name][: len(value)], value)
    assert torch.equal(grown.loss(batch, grown)["loss"], network.loss(batch, network)["loss"])
    fifth = replace(batch, embodiment=torch.full_like(batch.embodiment, 2))
    grown.loss(fifth, grown)["loss"].backward()
    gradient = grown.decode_action.second.weight.grad
    assert gradient[2].abs().sum() > 0 and (gradient[:2] == 0).all()


# --- network ----------------------------------------------------------------------------------------------


def test_padded_dimensions_and_steps_beyond_the_episode_do_not_matter():
    network, batch = make_network(), make_batch()

    def gradients(b: PolicyBatch) -> list[torch.Tensor]:
        network.zero_grad()
        network.loss(b, network)["loss"].backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    junk = torch.randn(batch.actions.shape) * 100
    changed = replace(
        batch,
        actions=torch.where(batch.real, batch.actions, junk),
        noise=torch.where(batch.real, batch.noise, junk),
    )
    for mine, theirs in zip(gradients(batch), gradients(changed), strict=True):
        assert torch.equal(mine, theirs)
    encoder, decoder = network.encode_action.first.weight.grad, network.decode_action.second.weight.grad
    for robot, dim in enumerate(DIMS):
        assert (encoder[robot, dim:] == 0).all() and (encoder[robot, :dim] != 0).any()
        assert (decoder[robot, :, dim:] == 0).all() and (decoder[robot, :, :dim] != 0).any()


def test_flow_loss_is_the_mean_over_real_elements():
    network, batch = make_network(), make_batch()
    intent = network.bridge(batch.hidden, batch.mask)
    noise = batch.noise * batch.real
    noised = flow.interpolate(batch.actions, noise, batch.tau)
    velocity, _ = network.velocity(noised, batch.tau, intent, batch.state, batch.embodiment)
    slow = [((velocity - (batch.actions - noise))[tuple(at)] ** 2).item() for at in batch.real.nonzero()]
    assert network.loss(batch, network)["loss_flow"].item() == pytest.approx(sum(slow) / len(slow), rel=1e-5)


def test_future_target_comes_from_the_teacher_and_carries_no_gradient():
    network, teacher, batch = make_network(0), make_network(1), make_batch()
    losses = network.loss(batch, teacher)
    total = losses["loss_flow"] + CONFIG.future_weight * losses["loss_future"]
    assert torch.equal(losses["loss"], total) and 0 < losses["loss_future"] < 2
    losses["loss_future"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert network.future.grad.abs().sum() > 0 and network.predict_future[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.dit.blocks[3].parameters()), "the loss taps block 3 of 4"
    off = copy.deepcopy(network)
    off.config = replace(CONFIG, future_weight=0)
    assert torch.equal(off.loss(batch, teacher)["loss"], losses["loss_flow"])


def test_overfits_one_batch_and_samples_its_actions():
    network, one = make_network(), make_batch()
    names = ("hidden", "mask", "future_hidden", "future_mask", "state", "actions", "real", "embodiment")
    batch = replace(one, **{name: torch.cat([getattr(one, name)] * 4) for name in names})
    optimizer = torch.optim.Adam(network.parameters(), 5e-3, betas=(0.9, 0.95))
    g = torch.Generator().manual_seed(0)
    curve = []
    for step in range(300):
        noise, tau = torch.randn(batch.actions.shape, generator=g), flow.sample_time(32, g)
        losses = network.loss(replace(batch, noise=noise, tau=tau), network)
        optimizer.zero_grad()
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 300)
        optimizer.step()
        curve.append(losses["loss_flow"].item())
    assert sum(curve[-20:]) < 0.15 * sum(curve[:20])
    error = (sample(network, one, one.noise) - one.actions)[one.real].abs()
    assert error.mean() < 0.1


def test_sampling_is_repeatable_and_independent_of_the_batch():
    network, batch = make_network(), make_batch()
    together = sample(network, batch, batch.noise)
    assert torch.equal(together, sample(network, batch, batch.noise))
    alone = ("hidden", "mask", "state", "embodiment", "real")
    one = replace(batch, **{name: getattr(batch, name)[2:3] for name in alone})
    torch.testing.assert_close(sample(network, one, batch.noise[2:3]), together[2:3], atol=1e-5, rtol=1e-5)
    assert (together[:, :, 4:][batch.embodiment == 0] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"heads": 3}, "multiple of 2"), ({"future_layer": 5}, "1..blocks"), ({"ema": 1.0}, "ema in")],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(BlmError, match=message):
        replace(CONFIG, **change)


def test_parameters_are_all_used():
    network, batch = make_network(), make_batch()
    network.loss(batch, network)["loss"].backward()
    unused = [name for name, p in network.named_parameters() if p.grad is None]
    assert not unused and isinstance(network, nn.Module)


# --- checkpoint -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[CheckpointPolicy, Path]:
    policy, folder = make_policy(), tmp_path_factory.mktemp("policy") / "checkpoint"
    policy.save(folder, {"command": "test"})
    return policy, folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    saved[0].save(tmp_path / "checkpoint", {})
    return tmp_path / "checkpoint"


def test_save_and_load_give_the_same_actions_bit_for_bit(saved):
    policy, folder = saved
    loaded = CheckpointPolicy.load(folder)
    assert isinstance(loaded, Policy) and loaded.contract == policy.contract
    for robot in ("arm", "leg"):
        chunk, again = policy.act(make_observation(robot)), loaded.act(make_observation(robot))
        np.testing.assert_array_equal(chunk.actions, again.actions)
        assert chunk.actions.shape == (5, DIMS[robot == "leg"]) and chunk.actions.dtype == np.float32
    assert not [path for path in folder.parent.iterdir() if path != folder]


def test_act_is_repeatable_and_batches_give_the_same_actions(saved):
    policy, _ = saved
    observations = [make_observation(robot, seed) for seed, robot in enumerate(("leg", "arm", "leg"))]
    together = policy.act_batch(observations)
    for observation, chunk in zip(observations, together, strict=True):
        alone = policy.act(observation)
        np.testing.assert_array_equal(alone.actions, policy.act(observation).actions)
        np.testing.assert_allclose(alone.actions, chunk.actions, atol=1e-5)
    other = policy.act(replace(observations[0], seed=7))
    assert np.abs(other.actions - together[0].actions).max() > 1e-3


def test_actions_are_absolute_targets_within_the_limits(saved):
    policy, _ = saved
    here = make_observation()
    moved = replace(here, state=here.state + np.eye(4)[0] * 0.95)
    actions = policy.act(moved).actions
    space = policy.contract.action_spaces["arm"]
    assert (actions >= np.array(space.low)).all() and (actions <= np.array(space.high)).all()
    assert actions[:, 0].max() == 1.0, "a target beyond the joint limit is clipped to it"


def test_observations_that_do_not_fit_are_refused(saved):
    policy, _ = saved
    with pytest.raises(BlmError, match="lacks camera 'base'"):
        policy.act(replace(make_observation(), images={}))
    with pytest.raises(BlmError, match="unknown robot 'tail'"):
        policy.act(replace(make_observation(), robot="tail"))


def test_the_revision_names_the_weights(saved):
    assert saved[0].contract.revision == make_policy().contract.revision != make_policy(1).contract.revision


def test_the_contract_identifies_the_normalisation(saved):
    policy, _ = saved
    (robot, transforms), *_ = policy.transforms.items()
    wider = replace(transforms.state, high=np.asarray(transforms.state.high) + 1)
    transforms = {**policy.transforms, robot: replace(transforms, state=wider)}
    other = with_hashes(policy.contract, policy.network, transforms, policy.frozen.fingerprint)
    assert other.revision == policy.contract.revision
    assert policy.contract.statistics and other.statistics != policy.contract.statistics
    turned = dict(reversed(policy.transforms.items()))
    assert with_hashes(policy.contract, policy.network, turned).statistics == policy.contract.statistics


@pytest.mark.parametrize(
    "name", ["policy.safetensors", "stats.json", "config.json", "backbone/model.safetensors"]
)
def test_an_altered_or_missing_file_is_named(copied, name):
    data = bytearray((copied / name).read_bytes())
    data[-2] ^= 1
    (copied / name).write_bytes(data)
    for load in (CheckpointPolicy.load, load_checkpoint):
        with pytest.raises(BlmError, match=f"{name} is altered; copy the folder again"):
            load(copied)
    (copied / name).unlink()
    for load in (CheckpointPolicy.load, load_checkpoint):
        with pytest.raises(BlmError, match=f"{name} is missing; copy the folder again"):
            load(copied)


def rewrite_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps(checkpoint_module._hashes(folder)))


def test_another_backbone_is_refused_even_with_a_matching_manifest(copied):
    Backbone(*make_nano(seed=1, layers=2, width=32)).write_into(copied / "backbone")
    rewrite_manifest(copied)
    with pytest.raises(BlmError, match="is not the frozen one of Stage II"):
        CheckpointPolicy.load(copied)


def load_with_backbone(folder: Path, change: Callable[[Tensor], Tensor]) -> CheckpointPolicy:
    """Load a checkpoint after a change of one weight of its backbone, with a matching manifest."""
    file = folder / "backbone/model.safetensors"
    weights = load_file(file)
    name = min(name for name in weights if name.endswith("q_proj.weight"))
    weights[name] = change(weights[name].clone())
    save_file(weights, file, {"format": "pt"})
    rewrite_manifest(folder)
    return CheckpointPolicy.load(folder)


def test_one_changed_bit_of_a_frozen_weight_is_refused(copied):
    def flip(weight: Tensor) -> Tensor:
        weight.view(torch.int32).view(-1)[5] ^= 1
        return weight

    load_with_backbone(copied, lambda weight: weight)
    with pytest.raises(BlmError, match="is not the frozen one of Stage II"):
        load_with_backbone(copied, flip)


def test_other_logits_of_the_same_weights_only_warn(copied, capsys):
    config = json.loads((copied / "config.json").read_text())
    assert config["frozen"]["weights"] == config["frozen"]["fingerprint"]
    config["frozen"]["logits"][3] += 0.25
    (copied / "config.json").write_text(json.dumps(config))
    rewrite_manifest(copied)
    CheckpointPolicy.load(copied)
    message = capsys.readouterr().err
    assert "warning: checkpoint" in message and "differ by 0.25 from those at training" in message


def test_a_float32_checkpoint_can_be_loaded_in_bfloat16(copied, capsys):
    """The hash is of the stored precision: it is compared before the weights are converted."""
    policy = CheckpointPolicy.load(copied, dtype="bfloat16")
    assert policy.backbone.model.dtype == torch.bfloat16 and "warning" not in capsys.readouterr().err
    assert policy.network.state_dict()["bridge.latents"].dtype == torch.float32
    assert (
        policy.backbone.model.get_submodule("model.language_model.rotary_emb").inv_freq.dtype == torch.float32
    )
    exact = CheckpointPolicy.load(copied).act(make_observation()).actions
    np.testing.assert_allclose(policy.act(make_observation()).actions, exact, atol=0.1)
    assert policy.contract.revision == CheckpointPolicy.load(copied).contract.revision
    with pytest.raises(BlmError, match=r"cannot write .*: the backbone .* is not the frozen one"):
        policy.save(copied, {})


def test_an_older_checkpoint_is_compared_by_its_own_hash(copied):
    policy = make_policy()
    config = json.loads((copied / "config.json").read_text())
    del config["frozen"]["weights"]
    config["frozen"]["fingerprint"] = policy.backbone.fingerprint_with_computed_buffers()
    (copied / "config.json").write_text(json.dumps(config))
    rewrite_manifest(copied)
    assert CheckpointPolicy.load(copied).frozen.weights == ""
    with pytest.raises(BlmError, match="older checkpoint covers values that another processor"):
        load_with_backbone(copied, lambda weight: weight + 1)


def test_a_foreign_format_folder_or_prompt_is_refused(copied, tmp_path, monkeypatch):
    with pytest.raises(BlmError, match=r"no checkpoint at .* give the folder that Stage II wrote"):
        CheckpointPolicy.load(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(codec, "control_prompt", lambda *_, **__: make_prompt("other words"))
        with pytest.raises(BlmError, match="control prompts of version"):
            CheckpointPolicy.load(copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "format": 99}))
    rewrite_manifest(copied)
    with pytest.raises(BlmError, match="has format 99, this program reads 1"):
        CheckpointPolicy.load(copied)


def make_prompt(text: str) -> tuple[Message, ...]:
    return (Message("user", (text,)),)


def test_saving_again_replaces_the_folder_and_keeps_what_others_added(copied):
    (copied / "note.txt").write_text("mine")
    (copied / "README.md").write_text("my own card")
    make_policy(1).save(copied, {})
    assert (copied / "note.txt").read_text() == "mine"
    assert (copied / "README.md.kept").read_text() == "my own card"
    assert "my own card" not in (copied / "README.md").read_text()
    make_policy(1).save(copied, {})
    assert not (copied / "README.md.kept.kept").exists()
    assert CheckpointPolicy.load(copied).contract.revision == make_policy(1).contract.revision


def test_a_folder_that_is_no_checkpoint_or_was_altered_is_not_replaced(copied, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "manifest.json").write_text('{"mine": 1}')
    with pytest.raises(BlmError, match=r"its manifest.json belongs to another program"):
        make_policy(1).save(theirs, {})
    assert (theirs / "manifest.json").read_text() == '{"mine": 1}'
    with (copied / "stats.json").open("a") as file:
        file.write(" ")
    before = (copied / "stats.json").read_bytes()
    with pytest.raises(BlmError, match=r"stats.json is altered"):
        make_policy(1).save(copied, {})
    assert (copied / "stats.json").read_bytes() == before


def test_keys_and_values_of_intent_tokens_are_computed_once_per_chunk(monkeypatch):
    network, batch = make_network().eval(), make_batch()
    intent = network.bridge(batch.hidden, batch.mask)
    arguments = (batch.noise, batch.tau, intent, batch.state, batch.embodiment)
    memory = network.dit.cache_intent(intent)
    assert [kept is not None for kept in memory] == [True, False, True, False]
    for made, slow in zip(network.velocity(*arguments, memory), network.velocity(*arguments), strict=True):
        torch.testing.assert_close(made, slow, rtol=0, atol=0)
    calls, original = [], bridge_module.Attention.keys_values
    monkeypatch.setattr(
        bridge_module.Attention, "keys_values", lambda self, x: calls.append(x) or original(self, x)
    )
    dims = batch.real.any(1)
    network.sample(batch.hidden, batch.mask, batch.state, batch.embodiment, batch.noise, dims)
    of_intent = [x for x in calls if x.shape == intent.shape and torch.equal(x, intent)]
    assert len(of_intent) == 2, "once in each of two blocks, not in each of four steps"


def test_prefix_weights_decrease():
    weights = flow.prefix_weights(length=6, inference_delay=2, horizon=8)
    assert weights[:2].tolist() == [1.0, 1.0] and weights[6:].tolist() == [0.0, 0.0]
    assert (weights[2:6].diff() < 0).all() and 0 < weights[5] < weights[2] < 1
    c = (6 - 3) / (6 - 2 + 1)
    assert weights[3].item() == pytest.approx(c * (np.exp(c) - 1) / (np.e - 1))
    assert flow.prefix_weights(3, 3, 5).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_guidance_affects_only_the_prefix():
    """The velocity of a point mass at 0: every path ends there unless it is guided elsewhere."""
    noise, wanted = torch.randn(2, 8, 3), torch.full((2, 8, 3), 2.0)
    weights = torch.tensor([[1.0] * 4 + [0.0] * 4] * 2)

    def velocity(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        return -x / (1 - tau.view(-1, 1, 1)) * 0.5  # weak, so that clean actions depend on x

    free = flow.euler(velocity, noise, 8)
    led = flow.euler(flow.guided(velocity, flow.ActionPrefix(wanted, weights)), noise, 8)
    assert (led[:, :4] - wanted[:, :4]).abs().mean() < 0.6 * (free[:, :4] - wanted[:, :4]).abs().mean()
    torch.testing.assert_close(led[:, 4:], free[:, 4:])


def test_real_time_chunking_continues_the_last_chunk(saved):
    policy, look = saved[0], make_observation("arm")
    chunking = RealTimeChunkingPolicy(policy)
    first = chunking.act(look)
    np.testing.assert_array_equal(first.actions, policy.act(look).actions)
    again = replace(look, seed=5)
    left = first.actions[policy.contract.execute :]

    def jump(chunk: ActionChunk) -> float:
        return float(np.abs(chunk.actions[: len(left)] - left)[0].mean())

    assert jump(chunking.act(again)) < 0.6 * jump(policy.act(again))
    chunking.reset()
    np.testing.assert_array_equal(chunking.act(again).actions, policy.act(again).actions)
    with pytest.raises(BlmError, match=r"inference_delay \(frozen on the wire\) is 9"):
        policy.act(replace(look, chunk=left, inference_delay=9))
    with pytest.raises(BlmError, match=r"the current chunk has shape \(40, "):
        policy.act(replace(look, chunk=np.repeat(left, 40, axis=0)[:40]))


def test_the_model_card_states_contract_proof_and_origin(saved):
    policy, folder = saved
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: blm") and policy.frozen.fingerprint in card
    for robot, space in policy.contract.action_spaces.items():
        assert f"| {robot} | " in card and all(name in card for name in space.names)
    assert '"command": "test"' in card and f"tapped after block {policy.tap.layer}" in card


def test_people_may_add_to_the_card(copied):
    with (copied / "README.md").open("a") as card:
        card.write("It stacks cubes.\n")
    CheckpointPolicy.load(copied)


def test_a_policy_of_two_frames_sees_the_observation_before():
    one = make_policy()
    two = copy.copy(one)
    two.contract = replace(one.contract, frames=2)
    before, now = make_observation(seed=1), replace(make_observation(seed=2), seed=1)
    alone, repeated, moved = (
        two.act(replace(now, history=history)).actions for history in ((), (now,), (before,))
    )
    assert np.array_equal(alone, repeated), "at the start of an episode, the first observation is repeated"
    assert not np.array_equal(repeated, moved) and not np.array_equal(alone, one.act(now).actions)
    with pytest.raises(BlmError, match="history of 2; the policy sees 2 frames, so at most 1"):
        two.act(replace(now, history=(before, before)))
    with pytest.raises(BlmError, match="history of 1; the policy sees 1 frames"):
        one.act(replace(now, history=(before,)))
    with pytest.raises(BlmError, match="lacks camera 'base'"):
        two.act(replace(now, history=(replace(before, images={}),)))


def test_a_policy_of_two_frames_is_saved_and_loaded(tmp_path):
    policy = make_policy()
    policy.contract = replace(policy.contract, frames=2)
    policy.save(tmp_path / "checkpoint", {})
    loaded = CheckpointPolicy.load(tmp_path / "checkpoint")
    observation = replace(make_observation(), history=(make_observation(),))
    assert loaded.contract.frames == 2
    assert np.array_equal(policy.act(observation).actions, loaded.act(observation).actions)
    assert "frames" not in make_policy().contract.to_json()  # as in older checkpoints


def test_servers_refuse_a_policy_that_sees_several_observations():
    policy = make_policy()
    policy.contract = replace(policy.contract, frames=3)
    with pytest.raises(BlmError, match="sees 3 observations, and the protocols of robots carry one"):
        create_app(policy)


# --- regularisation ---------------------------------------------------------------------------------------


def test_dropout_acts_in_training_only_and_adds_no_weights():
    torch.manual_seed(0)
    network = PolicyNetwork(replace(CONFIG, dropout=0.5), HIDDEN, len(DIMS))
    plain = make_network()
    assert network.state_dict().keys() == plain.state_dict().keys()
    network.load_state_dict(plain.state_dict())
    batch = make_batch()

    def loss(module: PolicyNetwork) -> float:
        return float(module.loss(batch, plain)["loss"].detach())

    assert len({loss(network.train()) for _ in range(3)}) == 3
    assert loss(network.eval()) == loss(plain.train()) == loss(plain.eval())
