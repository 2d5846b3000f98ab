import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from blm.datasets.lerobot import EpisodeDataset
from blm.datasets.mixture import kept_frames
from blm.training.policy.hashed_backbone import HashedBackbone
from blm.training.policy.hidden_state_cache import cache_hidden_states
from blm.training.policy.hidden_states import (
    HiddenStateConfig,
    LiveHiddenStates,
    collate,
)
from blm.types import BlmError
from tests.support.hidden_states import make_backbone, make_dataset

CONFIG = HiddenStateConfig(layer=1, cameras=("base", "wrist"), batch_size=8, workers=0, shard_frames=30)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[HashedBackbone, EpisodeDataset]:
    folder = tmp_path_factory.mktemp("intents")
    backbone = make_backbone(folder / "backbone")
    return HashedBackbone.of(backbone, str(folder / "backbone")), make_dataset(folder)


@pytest.fixture(scope="module")
def cached(world, tmp_path_factory):
    hashed, dataset = world
    folder = tmp_path_factory.mktemp("cache") / "arm"
    return cache_hidden_states(hashed, dataset, CONFIG, folder), folder


def test_cache_holds_what_a_direct_tap_of_one_frame_gives(world, cached):
    hashed, dataset = world
    frames = np.array([45, 0, 19, 60])  # any order, all episodes and shards, two prompt lengths
    rows = cached[0].read(frames)
    for frame, row in zip(frames, rows, strict=True):
        slow = LiveHiddenStates(hashed.backbone, dataset, CONFIG).read(np.array([frame]))[0]
        assert row.dtype == np.float16 and row.shape == slow.shape
        np.testing.assert_allclose(row, slow, rtol=2e-3, atol=2e-3)
    assert len({len(row) for row in rows}) == 2
    assert len(list(cached[1].glob("*.npy"))) == 2


def test_collate_pads_on_the_right_and_masks_the_padding(cached):
    rows = cached[0].read(np.array([0, 19]))
    hidden, mask = collate(rows)
    assert mask.sum(1).tolist() == [len(row) for row in rows]
    for i, row in enumerate(rows):
        assert torch.equal(hidden[i][mask[i]], torch.from_numpy(np.array(row)))


def test_reopening_computes_nothing_and_a_killed_run_continues(world, cached):
    hashed, dataset = world
    before = {path.name: path.stat().st_mtime_ns for path in cached[1].iterdir()}
    cache_hidden_states(hashed, dataset, CONFIG, cached[1])
    assert before == {path.name: path.stat().st_mtime_ns for path in cached[1].iterdir()}
    journal = cached[1] / "journal.jsonl"  # killed after the first shard: no manifest, one line
    (cached[1] / "manifest.json").unlink()
    journal.write_text(journal.read_text().splitlines()[0] + "\n")
    (cached[1] / "00001.npy").unlink()
    cache_hidden_states(hashed, dataset, CONFIG, cached[1])
    after = {path.name: path.stat().st_mtime_ns for path in cached[1].iterdir()}
    assert after["00000.npy"] == before["00000.npy"] and after["00001.npy"] != before["00001.npy"]


def test_only_the_missing_part_must_fit_on_the_disk(world, tmp_path, monkeypatch, capsys):
    hashed, dataset = world
    made = cache_hidden_states(hashed, dataset, CONFIG, tmp_path / "made")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "made").glob("*.npy")}
    missing = sizes["00001.npy"]
    (tmp_path / "made/00001.npy").unlink()
    (tmp_path / "made/manifest.json").unlink()
    journal = tmp_path / "made/journal.jsonl"
    journal.write_text(journal.read_text().splitlines()[0] + "\n")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=missing + 1000))
    with pytest.raises(
        BlmError, match=r"does not fit: 61 frames x .* GB free\); use a larger stride or another"
    ):
        cache_hidden_states(hashed, dataset, CONFIG, tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.npy"))
    again = cache_hidden_states(hashed, dataset, CONFIG, tmp_path / "made")
    frames = np.arange(61)
    assert all(np.array_equal(a, b) for a, b in zip(made.read(frames), again.read(frames), strict=True))


def test_a_stale_cache_is_refused_with_what_differs(world, cached, tmp_path):
    hashed, dataset = world
    for config, name in (
        (replace(CONFIG, layer=2), "layer"),
        (replace(CONFIG, cameras=("base",)), "prompt, cameras"),
        (replace(CONFIG, stride=2), "stride"),
    ):
        with pytest.raises(BlmError, match=f"stale: it has another {name}; name another folder"):
            cache_hidden_states(hashed, dataset, config, cached[1])
    other = make_backbone(tmp_path / "other", seed=1)
    with pytest.raises(BlmError, match="another backbone;"):
        cache_hidden_states(HashedBackbone.of(other, str(tmp_path / "other")), dataset, CONFIG, cached[1])
    more = make_dataset(tmp_path, lengths=(19, 22))
    with pytest.raises(BlmError, match="another dataset;"):
        cache_hidden_states(hashed, more, CONFIG, cached[1])


def test_an_altered_cache_is_refused(world, tmp_path, capsys):
    hashed, dataset = world
    cache_hidden_states(hashed, dataset, replace(CONFIG, stride=10), tmp_path)
    assert "GB free" in capsys.readouterr().err
    shard = tmp_path / "00000.npy"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BlmError, match=r"00000\.npy is missing or altered; move"):
        cache_hidden_states(hashed, dataset, replace(CONFIG, stride=10), tmp_path)


def test_workers_write_the_same_bytes_and_a_stride_keeps_fewer_frames(world, tmp_path):
    hashed, dataset = world
    stores = []
    for workers in (0, 1):
        folder = tmp_path / str(workers)
        config = replace(CONFIG, stride=8, workers=workers)
        stores.append(cache_hidden_states(hashed, dataset, config, folder))
    a, b = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("0", "1"))
    kept = kept_frames(dataset.starts, 8)
    assert [shard["frames"] for shard in a.values()] == [shard["frames"] for shard in b.values()]
    assert [frame for shard in a.values() for frame in shard["frames"]] == kept.tolist()
    for mine, theirs in zip(stores[0].read(kept), stores[1].read(kept), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=2e-3)
    with pytest.raises(AssertionError, match="not in the hidden-state cache"):
        stores[0].read(np.array([1]))


def test_views_hold_what_a_direct_tap_gives(world, tmp_path):
    hashed, dataset = world
    config = replace(CONFIG, views=2)
    made = cache_hidden_states(hashed, dataset, config, tmp_path)
    frames, views = np.array([45, 0, 19, 60, 0]), np.array([1, 2, 0, 2, 0])
    live = LiveHiddenStates(hashed.backbone, dataset, config)
    for row, slow in zip(made.read(frames, views), live.read(frames, views), strict=True):
        slack = np.abs(slow).max(-1, keepdims=True) / 1000
        assert row.dtype == np.float16 and (np.abs(row - slow) <= slack).all()
    plain, seen = live.read(frames), made.read(frames)
    assert np.abs(plain[0] - live.read(frames, views)[0]).max() > 1e-3, "a view is another picture"
    np.testing.assert_allclose(seen[0], plain[0], atol=np.abs(plain[0]).max() / 200)
