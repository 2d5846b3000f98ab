"""Compact hidden-state caches: their codes, their projection, and the training on them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blm.bridge import BridgeConfig, Perceiver
from blm.datasets.lerobot import EpisodeDataset
from blm.training.caches.processes import wait_for_file
from blm.training.loop.loop import LoopConfig
from blm.training.policy.add_robot import from_scratch
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hashed_backbone import HashedBackbone
from blm.training.policy.hidden_state_cache import ALONE, cache_hidden_states, cached_frame_bytes
from blm.training.policy.hidden_states import HiddenStateConfig, LiveHiddenStates, collate
from blm.training.policy.open_data import make_sampler, open_codec, open_datasets
from blm.training.policy.projection import FILE, open_projection, sample_frames
from blm.training.policy.quantization import (
    ErrorMeter,
    TokenCodec,
    code_bytes,
    normalised,
    outlier_channels,
)
from blm.training.policy.train import train_stage2
from blm.types import BlmError
from tests.support.hidden_states import make_backbone, make_dataset
from tests.support.policy_training import POLICY

CONFIG = HiddenStateConfig(
    layer=1, cameras=("base", "wrist"), batch_size=8, workers=0, shard_frames=30, precision="compact"
)
OUTLIERS = [3, 40, 77]
WORST = 0.01
"""Bound of the worst error of a token [1]."""


def hidden_with_outliers(count: int, size: int = 256, seed: int = 0) -> Tensor:
    """Hidden states with three channels 100 times larger than the others, as of large models."""
    hidden = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    hidden[:, OUTLIERS] *= 100
    return hidden


def int8_with_one_scale(hidden: Tensor) -> Tensor:
    """What older versions stored."""
    scale = hidden.abs().amax(-1, keepdim=True) / 127
    return (hidden / scale).round() * scale


def worst_error(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def test_outlier_channels_leave_the_other_channels_their_precision() -> None:
    codec = TokenCodec.fit([hidden_with_outliers(2000)], 1024)
    hidden = hidden_with_outliers(1000, seed=1)
    wanted, found = normalised(hidden), codec.decode(codec.encode(hidden))
    old = normalised(int8_with_one_scale(hidden))
    others = [channel for channel in range(256) if channel not in OUTLIERS]
    assert worst_error(found, wanted) < WORST and worst_error(old, wanted) > 3 * WORST
    assert worst_error(found[:, others], wanted[:, others]) < 2 * WORST
    assert worst_error(old[:, others], wanted[:, others]) > 0.5


@pytest.mark.parametrize("dims", [64, 1024])
def test_codes_have_the_size_and_the_error_that_they_claim(dims: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(40, 256, generator=generator)  # 40 of 256 dimensions, so 64 channels hold all
    hidden = torch.randn(500, 40, generator=generator) @ mixing + 5
    codec = TokenCodec.fit(hidden.split(100), dims)
    codes = codec.encode(hidden)
    assert codes.dtype == torch.uint8 and codes.shape == (500, code_bytes(256, dims))
    kept = min(dims, 256)
    assert code_bytes(256, dims) == kept + outlier_channels(kept) + 2 and codec.dims == kept
    assert codec.explained == pytest.approx(1, abs=1e-5)
    decoded = codec.decode(codes.view(5, 100, -1)).flatten(0, 1)
    meter = ErrorMeter()
    for part in range(0, 500, 100):
        meter.add(hidden[part : part + 100], decoded[part : part + 100])
    error, wanted = meter.result(), normalised(hidden)
    assert error.worst == pytest.approx(worst_error(decoded, wanted)) and error.rms < error.worst < WORST
    assert error.cosine == pytest.approx(float(F.cosine_similarity(decoded, wanted, dim=-1).min()))


def test_a_constant_token_and_a_constant_channel_are_coded() -> None:
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    hidden[:, 4], hidden[7] = 2.0, 3.0
    codec = TokenCodec.fit([hidden], 32)
    decoded = codec.decode(codec.encode(hidden))
    assert torch.isfinite(decoded).all() and decoded[7].abs().max() < 0.05
    assert worst_error(decoded[:7], normalised(hidden)[:7]) < WORST


def test_the_bridge_gives_the_same_intent_tokens() -> None:
    """It begins with the norm that the codes have had, so only rounding differs."""
    torch.manual_seed(0)
    bridge = Perceiver(BridgeConfig(width=16, latents=3, blocks=1, heads=2), 256)
    hidden = hidden_with_outliers(120).view(4, 30, 256) * 7
    codec = TokenCodec.fit([hidden.flatten(0, 1)], 1024)
    mask = torch.ones(4, 30, dtype=torch.bool)
    found = bridge(codec.decode(codec.encode(hidden.flatten(0, 1))).view(4, 30, 256), mask)
    assert F.cosine_similarity(found, bridge(hidden, mask), dim=-1).min() > 0.9999


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[HashedBackbone, list[EpisodeDataset]]:
    folder = tmp_path_factory.mktemp("world")
    backbone = make_backbone(folder / "backbone")
    datasets = [make_dataset(folder), make_dataset(folder, "leg", 3, lengths=(9, 8))]
    return HashedBackbone.of(backbone, str(folder / "backbone")), datasets


@pytest.mark.parametrize("dims", [16, 1024])
def test_a_cache_decodes_to_the_normalised_tap(world, tmp_path, capsys, dims):
    hashed, datasets = world
    config = replace(CONFIG, dims=dims, views=1)
    codec = open_projection(hashed, datasets, config, tmp_path, ALONE)
    dataset = datasets[0]
    cache = cache_hidden_states(hashed, dataset, config, tmp_path / "arm", codec=codec)
    frames, views = np.array([45, 0, 60, 0]), np.array([1, 0, 1, 1])
    live = LiveHiddenStates(hashed.backbone, dataset, config).read(frames, views)
    shards = json.loads((tmp_path / "arm/manifest.json").read_text()).values()
    worst = max(shard["worst_error"] for shard in shards)
    assert all(0 < shard["error"] <= shard["worst_error"] for shard in shards)
    assert min(shard["cosine"] for shard in shards) > 1 - worst
    for codes, slow in zip(cache.read(frames, views), live, strict=True):
        assert codes.dtype == np.uint8
        found, wanted = codec.decode(torch.from_numpy(np.array(codes))), normalised(torch.from_numpy(slow))
        assert worst_error(found, wanted) <= worst * 1.01 + 1e-3
    assert worst < (WORST if dims == 1024 else 0.9)
    printed = capsys.readouterr().err
    assert f"{min(dims, 32)} of 32 channels hold" in printed and "worst token" in printed
    tokens = sum(sum(shard["lengths"]) for shard in shards)
    size = sum(path.stat().st_size for path in (tmp_path / "arm").glob("*.npy"))
    assert size == pytest.approx(cached_frame_bytes(tokens, 32, precision="compact", dims=dims), rel=0.05)
    spec = json.loads((tmp_path / "arm/spec.json").read_text())
    assert spec["projection"] == codec.sha256 and spec["explained"] == codec.explained


def test_a_projection_is_made_once_and_by_the_same_tokens_the_same(world, tmp_path):
    hashed, datasets = world
    first = open_projection(hashed, datasets, replace(CONFIG, dims=16), tmp_path / "a", ALONE)
    changed = (tmp_path / "a" / FILE).stat().st_mtime_ns
    again = open_projection(hashed, datasets[1:], replace(CONFIG, dims=16), tmp_path / "a", ALONE)
    assert (tmp_path / "a" / FILE).stat().st_mtime_ns == changed and again.sha256 == first.sha256
    anew = open_projection(hashed, datasets, replace(CONFIG, dims=16), tmp_path / "b", ALONE)
    assert anew.sha256 == first.sha256
    assert open_projection(hashed, datasets, replace(CONFIG, precision="float16"), tmp_path, ALONE) is None


def test_a_sample_has_every_instruction(world):
    dataset = world[1][0]
    frames = sample_frames(dataset, 4, 2)
    assert len(frames) == 2 and len({*dataset.task_index[frames]}) == len(dataset.instructions) == 2
    assert sample_frames(dataset, 4, 10**6).tolist() == sorted({*sample_frames(dataset, 4, 10**6)})


def test_other_projections_and_older_caches_are_refused_by_name(world, tmp_path):
    hashed, (dataset, other) = world
    codec = open_projection(hashed, [dataset], CONFIG, tmp_path, ALONE)
    cache_hidden_states(hashed, dataset, CONFIG, tmp_path / "arm", codec=codec)
    with pytest.raises(BlmError, match=r"made for another dims \(32\); name another folder"):
        open_projection(hashed, [dataset], replace(CONFIG, dims=16), tmp_path, ALONE)
    with pytest.raises(BlmError, match="made for another layer; name another folder"):
        open_projection(hashed, [dataset], replace(CONFIG, layer=2), tmp_path, ALONE)
    (tmp_path / FILE).unlink()
    anew = open_projection(hashed, [other], CONFIG, tmp_path, ALONE)
    with pytest.raises(BlmError, match=r"was made with another projection .* not .*: all caches of a run"):
        cache_hidden_states(hashed, dataset, CONFIG, tmp_path / "arm", codec=anew)
    plain = replace(CONFIG, precision="float16")
    with pytest.raises(BlmError, match="another precision, explained, projection; name another folder"):
        cache_hidden_states(hashed, dataset, plain, tmp_path / "arm")
    spec = json.loads((tmp_path / "arm/spec.json").read_text())
    (tmp_path / "arm/spec.json").write_text(json.dumps({**spec, "precision": "int8"}))
    with pytest.raises(BlmError, match=r"precision 'int8' of older versions.*use 'compact'.*move the folder"):
        cache_hidden_states(hashed, dataset, plain, tmp_path / "arm")
    (tmp_path / FILE).write_bytes(b"not a projection")
    with pytest.raises(BlmError, match=r"projection\.safetensors' is no projection of a hidden-state cache"):
        open_projection(hashed, [dataset], CONFIG, tmp_path, ALONE)


def test_bad_settings_are_refused() -> None:
    for change, text in (
        ({"precision": "int8"}, "use 'compact'"),
        ({"precision": "int4"}, "valid: float16, compact"),
        ({"dims": 15}, "dims"),
        ({"pool": 0}, "pool"),
    ):
        with pytest.raises(BlmError, match=text):
            replace(CONFIG, **change)


def test_a_file_that_another_process_wrote_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("blm.training.caches.processes.SHARED_SECONDS", 0.0)
    monkeypatch.setattr("blm.training.caches.processes.POLL_SECONDS", 0.01)
    with pytest.raises(BlmError, match="is not the file that process 0 uses; name a folder that all"):
        wait_for_file(tmp_path / FILE, "0" * 64)


def test_batches_of_codes_give_the_losses_of_the_tap(world, tmp_path):
    hashed, datasets = world
    config = PolicyTrainingConfig(
        datasets=tuple(data.folder for data in datasets),
        backbone=hashed.source,
        intents=replace(CONFIG, stride=2),
        loop=LoopConfig(steps=3, batch_size=8, lr=4e-3, log_every=1),
        policy=POLICY,
        cache=tmp_path / "cache",
        execute=3,
        held_out=0.4,
        validation_batches=1,
    )
    start = from_scratch(POLICY, 32, ["arm", "leg"], seed=0)
    losses = []
    for one in (config, replace(config, cache=None)):
        codec = open_codec(hashed, datasets, one)
        batch = make_sampler(open_datasets(hashed, datasets, one, start, codec), one)(0)
        assert (batch.codec is None) == (one.cache is None)
        moved = batch.to("cpu")
        assert moved.codec is None and moved.hidden.shape[-1] == 32
        losses.append(float(start.network.loss(moved, start.network)["loss"].detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    folder = train_stage2(config, tmp_path / "out", {})
    inputs = json.loads((tmp_path / "out/inputs.json").read_text())
    assert len({one["projection"] for one in inputs["intents"]}) == 1
    assert json.loads((folder / "config.json").read_text())["pool"] == 1
    (config.cache / FILE).unlink()
    for name in ("arm", "leg"):
        (config.cache / name).rename(tmp_path / name)
    with pytest.raises(BlmError, match="holds"):
        train_stage2(replace(config, datasets=config.datasets[:1]), tmp_path / "out", {})


def test_collated_codes_are_masked(world, tmp_path):
    hashed, (dataset, _) = world
    codec = open_projection(hashed, [dataset], CONFIG, tmp_path, ALONE)
    cache = cache_hidden_states(hashed, dataset, CONFIG, tmp_path / "arm", codec=codec)
    rows = cache.read(np.array([0, 19]))
    codes, mask = collate(rows)
    decoded = codec.decode(codes)
    assert torch.isfinite(decoded).all() and mask.sum(1).tolist() == [len(row) for row in rows]
    assert len({len(row) for row in rows}) == 2


@pytest.mark.slow
def test_worker_processes_use_the_projection_of_the_file(world, tmp_path):
    hashed, (dataset, _) = world
    config = replace(CONFIG, stride=16, dims=16)
    codec = open_projection(hashed, [dataset], config, tmp_path, ALONE)
    made = [
        cache_hidden_states(hashed, dataset, replace(config, workers=n), tmp_path / str(n), codec=codec)
        for n in (0, 1)
    ]
    frames = np.array([0, 16, 19])
    for mine, theirs in zip(made[0].read(frames), made[1].read(frames), strict=True):
        both = [codec.decode(torch.from_numpy(np.array(row))) for row in (mine, theirs)]
        assert worst_error(*both) < WORST
