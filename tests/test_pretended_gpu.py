"""Every hot path on a pretended GPU: the results of the CPU, no meeting of devices, few waits of the host."""

from __future__ import annotations

import copy
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blm.app.model import check_device
from blm.backbone import Backbone
from blm.backbone.generation.generator import Generation
from blm.baselines.diffusion_policy import DiffusionPolicy
from blm.datasets.transforms import Normalize, RobotTransforms
from blm.policy.network import PolicyNetwork
from blm.policy.policy import CheckpointPolicy, FrozenProof
from blm.training.loop import distributed
from blm.training.loop.batches import Microbatch
from blm.training.loop.distributed import DataShard, Processes
from blm.training.loop.ema import Ema
from blm.training.loop.loop import LoopConfig, run_loop
from blm.training.policy import hidden_states
from blm.training.policy.hidden_states import HiddenStateConfig, cache_hidden_states
from blm.training.policy.train import PolicyTrainingConfig, train_stage2
from blm.training.sft.lora import Lora
from blm.training.sft.train import Stage1Config, TrainingSource, train_stage1
from blm.types import ActionSpace, BlmError, Image, Message, Observation, PolicyContract, Sampling
from tests.support.backbones import MAKERS, PROMPTS, picture
from tests.support.hidden_states import make_backbone, make_dataset
from tests.support.policy_training import POLICY
from tests.support.pretended_gpu import (
    DeviceMismatchError,
    GpuTensor,
    PretendedGpu,
    Sync,
    on_gpu,
    table,
    values,
)

GPU = "cuda:3"
"""Not the current GPU: whatever forgets the index lands on another one and is refused."""
ON_PICTURES = {"qwen2.5": 21, "qwen3": 26, "smolvlm": 4, "smolvlm2": 4}
"""Waits in a Stage I step on pictures, where not 1: vision towers of transformers read sizes back."""
ON_FEATURES = {"qwen3": 11}
"""The same with cached features: DeepStack adds some of them between blocks, through a boolean mask."""


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    with PretendedGpu() as machine:
        yield machine


@pytest.fixture(scope="module")
def made() -> dict[str, Backbone]:
    return {}


@pytest.fixture
def backbone(request: pytest.FixtureRequest, made: dict[str, Backbone]) -> Backbone:
    if request.param not in made:
        made[request.param] = MAKERS[request.param]()
    return twin(made[request.param])


every_family = pytest.mark.parametrize("backbone", list(MAKERS), indirect=True)


def twin(backbone: Backbone) -> Backbone:
    return Backbone(copy.deepcopy(backbone.model), backbone.processor)


def moved(backbone: Backbone) -> Backbone:
    on_gpu(backbone.model, GPU)
    return backbone


def of_the_package(syncs: list[Sync]) -> list[Sync]:
    """Those that code of the package causes itself and not through transformers."""
    return [sync for sync in syncs if sync.via.startswith(Path(sync.where.split(":")[0]).name)]


def assert_same(found: Any, wanted: Any) -> None:
    """Equal to the bit, and `found` is on the GPU that was asked for."""
    pairs = zip(found, wanted, strict=True)
    for name, (one, other) in enumerate(pairs):
        assert isinstance(one, GpuTensor) and str(one.device) == GPU, name
        assert torch.equal(values(one), other), name


# --- the pretended GPU itself -----------------------------------------------------------------------------


def test_tensors_meet_only_where_cuda_lets_them(gpu: PretendedGpu) -> None:
    x, cpu, scalar = torch.ones(3, device="cuda"), torch.ones(3), torch.ones(())
    assert x.device == torch.device("cuda", 0) and x.is_cuda
    assert values(x * scalar + 2.0).tolist() == [3.0] * 3
    assert values(x[torch.tensor([0, 2])]).tolist() == [1.0] * 2
    for refused in (
        lambda: x + cpu,
        lambda: cpu.add_(x),
        lambda: scalar.clone().add_(x.sum()),
        lambda: torch.stack([x.sum(), scalar]),
        lambda: cpu[torch.tensor([0], device="cuda")],
        lambda: x.index_select(0, torch.tensor([0])),
        lambda: torch.ones(3, device=GPU) + x,
        lambda: x.to(GPU),
        lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
        lambda: nn.Linear(3, 3)(x),
    ):
        with pytest.raises(DeviceMismatchError):
            refused()
    with pytest.raises(TypeError, match="numpy"):
        np.asarray(x)


def test_waits_of_the_host_are_counted_and_located(gpu: PretendedGpu) -> None:
    x, mask = torch.ones(3, device="cuda"), torch.ones(3, device="cuda") > 0
    cpu, pinned = torch.ones(3), torch.ones(3).pin_memory()

    def kinds(block: Any) -> list[str]:
        with gpu.counting() as syncs:
            block()
        return [sync.kind for sync in syncs]

    for block in (
        lambda: x.sum().item(),
        lambda: float(x.sum()),
        lambda: bool(mask.all()),
        lambda: x.tolist(),
        lambda: x[mask],
        lambda: mask.nonzero(),
        lambda: x.masked_select(mask),
        lambda: x.cpu(),
        lambda: cpu.to("cuda"),
        lambda: cpu.to("cuda", non_blocking=True),  # from pageable memory
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: x.new_tensor([1.0]),
        lambda: x.copy_(cpu),
        lambda: x[torch.tensor([0])],
        lambda: x.repeat_interleave(x.long()),
    ):
        assert len(kinds(block)) == 1
    for block in (
        lambda: pinned.to("cuda", non_blocking=True),
        lambda: torch.full((), 2.0, device="cuda"),
        lambda: torch.arange(3, device="cuda"),
        lambda: x.masked_fill(mask, 0.0),
        lambda: x.__setitem__(mask, 0.0),
        lambda: torch.where(mask, x, 0.0),
        lambda: nn.functional.one_hot(x.long(), 3),
    ):
        assert kinds(block) == []
    with gpu.counting() as syncs:
        distributed.read_scalars({"a": x.sum()})
    assert [sync.where.split(":")[0] for sync in syncs] == ["blm/training/loop/distributed.py"]


def test_the_kernels_are_the_cpus_and_tied_weights_stay_tied(gpu: PretendedGpu) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 8), nn.LayerNorm(8), nn.Linear(8, 5))
    net[2].weight = net[0].weight
    other = on_gpu(copy.deepcopy(net), GPU)
    assert other[2].weight is other[0].weight and isinstance(other[0].weight, nn.Parameter)
    assert copy.deepcopy(other)[2].weight is not other[2].weight
    ids = torch.tensor([[1, 2, 3], [0, 1, 4]])
    for module, tokens in ((net, ids), (other, ids.to(GPU))):
        q = module(tokens)[:, None]
        masks = (None, torch.ones(3, 3, dtype=torch.bool, device=tokens.device).tril())
        mixed = [nn.functional.scaled_dot_product_attention(q, q, q, mask) for mask in masks]
        torch.stack(mixed).square().sum().backward()
    assert_same([p.grad for p in other.parameters()], [p.grad for p in net.parameters()])


def test_nothing_is_left_behind() -> None:
    before = (torch.cuda._lazy_init, torch.cuda.current_device, torch.cuda.get_rng_state)
    with PretendedGpu():
        torch.ones(1, device="cuda")
    assert before == (torch.cuda._lazy_init, torch.cuda.current_device, torch.cuda.get_rng_state)
    assert not torch.__future__.get_swap_module_params_on_conversion()
    assert type(torch.ones(1)) is Tensor and torch.ones(1).device.type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            torch.ones(1, device="cuda")


# --- the training loop ------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(3, 8), nn.Linear(8, 8)])  # named as blocks are, for Muon
        self.norm, self.unused = nn.BatchNorm1d(8), nn.Linear(2, 2)

    def loss(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        x, factor = (part.to(self.norm.weight.device, non_blocking=True) for part in batch)
        out = self.norm(self.layers[1](nn.functional.dropout(self.layers[0](x), 0.5)))
        loss = (out.mean(-1) - x.sum(-1)).square().mean() * factor.mean()
        return loss, {"twice": 2 * loss.detach(), "rows": float(len(x)), "right": (out > 0).sum()}


def points(step: int, shard: DataShard, factor: float = 1.0) -> Microbatch[tuple[Tensor, ...]]:
    x = shard.of(torch.from_numpy(np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)))
    return Microbatch((x, torch.full((1,), factor)), (step,), weight=len(x), tokens=5 * len(x), positions=40)


@pytest.mark.parametrize("muon", [0.0, 0.02])
def test_the_loop_makes_the_steps_of_the_cpu_and_waits_once_in_each(
    gpu: PretendedGpu, tmp_path: Path, muon: float
) -> None:
    if muon and not hasattr(torch.optim, "Muon"):
        pytest.skip("Muon needs torch 2.9")
    config = LoopConfig(
        steps=5, batch_size=4, lr=1e-2, muon=muon, clip=0.5, accumulate=2, log_every=1, save_every=3
    )
    weights, logs = {}, {}
    for name in ("cpu", GPU):
        module = Net()
        module = on_gpu(module, name) if name != "cpu" else module
        ema = Ema(module, 0.9)
        with gpu.training_steps() as steps:
            run_loop(module, module.loss, points, config, tmp_path / name, ema=ema)
        weights[name] = [*module.state_dict().values(), *ema.module.state_dict().values()]
        logs[name] = log_rows(tmp_path / name)
    assert_same(weights[GPU], weights["cpu"])
    assert logs[GPU] == logs["cpu"] and len(logs["cpu"]) == 5
    assert {"loss", "twice", "rows", "right", "grad_norm", "tokens_per_s"} <= logs["cpu"][0].keys()
    of_checkpoints = [len([s for s in step if "/state.py" not in s.where]) for step in steps]
    assert of_checkpoints == [1] * 4, table(steps[0])


def test_a_step_that_is_not_finite_ends_before_the_weights_are_touched(
    gpu: PretendedGpu, tmp_path: Path
) -> None:
    module = on_gpu(Net(), GPU)
    before = [values(p).clone() for p in module.parameters()]
    config = LoopConfig(steps=5, batch_size=4)
    with pytest.raises(BlmError, match=r"loss nan.* at step 0, samples \[0\]"):
        run_loop(module, module.loss, lambda step, shard: points(step, shard, np.nan), config, tmp_path)
    assert all(torch.equal(values(p), old) for p, old in zip(module.parameters(), before, strict=True))


def log_rows(out: Path) -> list[dict[str, float]]:
    """The rows of a log without what depends on the clock."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    timed = ("samples_per_s", "tokens_per_s", "data_share", "seconds")
    return [{name: 0.0 if name in timed else value for name, value in row.items()} for row in rows]


# --- Stage I ----------------------------------------------------------------------------------------------


def conversations(side: int) -> list[tuple[Message, ...]]:
    """Some with a picture, some with two turns, and some of another length."""
    made = []
    for i in range(6):
        image = (Image(picture(i, side, side)),) if i % 3 else ()
        first = Message("user", (*image, "How many cubes?")), Message("assistant", (str(i),))
        more = Message("user", ("What colour is it?",)), Message("assistant", ("red" * (1 + i % 2),))
        made.append((*first, *more) if i % 2 else first)
    return made


def stage1(
    gpu: PretendedGpu, backbone: Backbone, out: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> list[list[Sync]]:
    """Train on the CPU and on the GPU, compare weights and logs, return the waits of each step."""
    monkeypatch.setattr(Backbone, "save", lambda self, folder: None)
    side = 112 if type(backbone.model).__name__.startswith("Llava") else 56
    sources = [TrainingSource(name="made", conversations=conversations(side))]
    loop = LoopConfig(steps=3, batch_size=3, log_every=1, save_every=100)
    config = Stage1Config(loop=loop, **changes)
    other = twin(backbone)
    train_stage1(backbone, sources, config, out / "cpu")
    with gpu.training_steps() as steps:
        train_stage1(moved(other), sources, config, out / "gpu")
    assert_same(other.model.state_dict().values(), backbone.model.state_dict().values())
    assert log_rows(out / "gpu") == log_rows(out / "cpu")
    return steps


@every_family
def test_stage_one_on_pictures(
    gpu: PretendedGpu, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    steps = stage1(gpu, backbone, tmp_path, monkeypatch)
    waits = ON_PICTURES.get(request.node.callspec.params["backbone"], 1)
    assert [len(step) for step in steps] == [waits, waits], table(steps[-1])


@every_family
def test_stage_one_on_cached_features(
    gpu: PretendedGpu, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    frozen = {"vision_scale": 0.0, "projector_scale": 0.0, "cache_features": True}
    steps = stage1(gpu, backbone, tmp_path, monkeypatch, **frozen, pack_length=128)
    waits = ON_FEATURES.get(request.node.callspec.params["backbone"], 1)
    assert [len(step) for step in steps] == [waits, waits], table(steps[-1])


@pytest.mark.parametrize("backbone", ["nano"], indirect=True)
@pytest.mark.parametrize(
    "changes",
    [
        {"vision_scale": 0.0, "cache_features": True},  # a trained projector behind a cached tower
        {"lora": Lora(rank=2), "checkpoint_blocks": True},
    ],
    ids=["projector", "lora"],
)
def test_stage_one_in_other_settings(
    gpu: PretendedGpu,
    backbone: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    with warnings.catch_warnings(action="ignore"):  # of peft and of checkpointing
        steps = stage1(gpu, backbone, tmp_path, monkeypatch, **changes)
    assert [len(step) for step in steps] == [1, 1], table(steps[-1])


# --- Stage II ---------------------------------------------------------------------------------------------


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
    )


@pytest.mark.parametrize("way", ["cached", "live", "muon in parts"])
def test_stage_two_waits_once_a_step(
    gpu: PretendedGpu,
    policy_config: PolicyTrainingConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    saved: dict[str, list[Tensor]] = {}

    def save(self: CheckpointPolicy, folder: Path, facts: Any) -> None:
        if folder.name == "checkpoint":
            saved[folder.parent.name] = [*self.network.state_dict().values()]

    monkeypatch.setattr(CheckpointPolicy, "save", save)
    monkeypatch.setattr("blm.training.policy.train.BestCheckpoint.update", lambda *_: None)
    loop = policy_config.loop
    if way == "muon in parts":
        loop = replace(loop, muon=0.02 * hasattr(torch.optim, "Muon"), accumulate=2)
    for name in ("cpu", GPU):
        cache = None if way == "live" else tmp_path / f"cache {name}"
        config = replace(policy_config, loop=loop, device=name, cache=cache)
        with gpu.training_steps() as steps:
            train_stage2(config, tmp_path / name, {})
    assert_same(saved[GPU], saved["cpu"])
    assert log_rows(tmp_path / GPU) == log_rows(tmp_path / "cpu")
    assert [len(step) for step in steps] == [1, 1], table(steps[-1])


def test_workers_that_fill_a_cache_get_the_device_by_its_full_name(
    gpu: PretendedGpu, policy_config: PolicyTrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blm.datasets.lerobot import open_dataset

    def run_units(*_: Any, setup_args: tuple[Any, ...], **__: Any) -> None:
        raise BlmError(setup_args[1])

    monkeypatch.setattr(hidden_states, "run_units", run_units)
    backbone = Backbone.load(policy_config.backbone, device=GPU)
    dataset = open_dataset(policy_config.datasets[0])
    with pytest.raises(BlmError, match=f"^{GPU}$"):
        cache_hidden_states(backbone, policy_config.backbone, dataset, policy_config.intents, tmp_path)


# --- tap, generation, act ---------------------------------------------------------------------------------


@every_family
def test_hidden_states_answers_and_logits(gpu: PretendedGpu, backbone: Backbone) -> None:
    other = moved(twin(backbone))
    a, b = (one.tap(one.encode(PROMPTS, side="right"), 2) for one in (backbone, other))
    assert_same([b.hidden, b.mask], [a.hidden, a.mask])
    assert torch.equal(other.probe_logits(), backbone.probe_logits())
    assert other.complete(PROMPTS, max_tokens=4) == backbone.complete(PROMPTS, max_tokens=4)
    assert other.complete(PROMPTS[:2], max_tokens=3, seed=1) == backbone.complete(
        PROMPTS[:2], max_tokens=3, seed=1
    )


@pytest.mark.parametrize("backbone", ["nano", "qwen3"], indirect=True)
def test_answers_read_in_pieces(gpu: PretendedGpu, backbone: Backbone) -> None:
    tokens = []
    for one in (backbone, moved(twin(backbone))):
        generation = Generation(one, piece_tokens=8, step_tokens=4096)
        sampling = Sampling(max_tokens=5, temperature=0.7, top_p=0.9, repetition_penalty=1.2, seed=3)
        prefill = generation.begin(generation.prepare(PROMPTS[0], [sampling, Sampling(max_tokens=3)]))
        while (answers := generation.advance(prefill)) is None:
            pass
        while generation.running:
            generation.step()
        tokens.append([answer.tokens for answer in answers])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("backbone", ["nano"], indirect=True)
def test_waits_for_a_token(gpu: PretendedGpu, backbone: Backbone) -> None:
    """It is read, and given back with its position; masks of padded prompts are inspected by transformers."""
    generation = Generation(moved(backbone))
    generation.start(PROMPTS, [Sampling(max_tokens=8)] * len(PROMPTS))
    with gpu.counting() as syncs:
        generation.step()
    assert len(of_the_package(syncs)) == 2 and len(syncs) <= 4, table(syncs)


def make_policy(backbone: Backbone) -> CheckpointPolicy:
    spaces = {
        robot: ActionSpace(
            robot=robot,
            names=(*(f"j{i}" for i in range(joints)), "gripper"),
            units=("rad",) * joints + ("opening",),
            low=(-2.0,) * joints + (0.0,),
            high=(2.0,) * joints + (1.0,),
        )
        for robot, joints in (("arm", 2), ("leg", 3))
    }
    torch.manual_seed(0)
    network = PolicyNetwork(POLICY, backbone.hidden_size, len(spaces))
    ranges = {robot: Normalize(-np.ones(space.dim), np.ones(space.dim)) for robot, space in spaces.items()}
    return CheckpointPolicy(
        backbone=backbone,
        frozen=FrozenProof("0" * 64, (0.0,)),
        layer=2,
        network=network,
        transforms={
            robot: RobotTransforms(state=one, normalize_actions=one, relative=True)
            for robot, one in ranges.items()
        },
        contract=PolicyContract(
            action_spaces=spaces, cameras=("base",), image_size=56, horizon=POLICY.horizon, execute=3
        ),
    )


@every_family
def test_actions(gpu: PretendedGpu, backbone: Backbone) -> None:
    other = twin(backbone)
    here, there = make_policy(backbone), make_policy(other)
    moved(other)
    on_gpu(there.network, GPU)
    assert there.device == GPU
    seen = [
        Observation(
            robot=robot,
            instruction="push the cube",
            images={"base": picture(i, 56, 56)},
            state=np.full(dim, 0.1 * i, np.float32),
            seed=i,
        )
        for i, (robot, dim) in enumerate((("arm", 3), ("leg", 4)))
    ]
    wanted = here.act_batch(seen)
    with gpu.counting() as syncs:
        found = there.act_batch(seen)
    for one, other_chunk in zip(found, wanted, strict=True):
        assert np.array_equal(one.actions, other_chunk.actions)
    in_progress = replace(seen[0], chunk=wanted[0].actions[3:])
    assert np.array_equal(there.act(in_progress).actions, here.act(in_progress).actions)
    kinds = Counter(sync.kind for sync in of_the_package(syncs))
    assert set(kinds) == {"copy to the device", "copy to the host"}, table(syncs)
    # four vectors, and at most five inputs of the backbone
    assert kinds["copy to the host"] == 1 and kinds["copy to the device"] <= 9, table(syncs)


# --- names of devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
def test_a_process_alone_keeps_its_device_and_one_of_several_gets_its_own(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    asked = []

    def state(cpu: bool) -> Any:
        asked.append(cpu)
        return SimpleNamespace(process_index=count - 1, num_processes=count, device=torch.device("cuda", 1))

    monkeypatch.setattr(distributed, "PartialState", state)
    for name in (GPU, torch.device(GPU)):
        assert Processes.join(name).device == torch.device(GPU if count == 1 else "cuda:1")
    assert Processes.join("cpu").device == torch.device("cpu")
    assert asked == [False, False, True]


def test_a_device_is_checked_by_kind_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_device(GPU)
    for name in ("cuda:4", "gpu", "cuda:x"):
        with pytest.raises(BlmError, match="cannot be used"):
            check_device(name)


def test_a_policy_names_its_device_in_full(gpu: PretendedGpu) -> None:
    network = on_gpu(nn.Linear(2, 2), GPU)
    assert DiffusionPolicy.device.fget(SimpleNamespace(network=network)) == GPU  # type: ignore[attr-defined]
