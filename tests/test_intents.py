import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from blm.backbone.backbone import Backbone
from blm.backbone.nano import make_nano
from blm.data.episodes import EpisodeDataset, finalize_dataset, open_dataset, stage_episode
from blm.data.mixture import kept_frames
from blm.training.intents import IntentConfig, LiveIntents, cache_intents, collate
from blm.types import ActionSpace, BlmError, Episode

SIDE = 32
CONFIG = IntentConfig(layer=1, cameras=("base", "wrist"), batch_size=8, workers=0, shard_frames=30)


def make_dataset(folder: Path, robot: str = "arm", joints: int = 2, lengths: tuple[int, ...] = (19, 22, 20)):
    """A robot whose joints go a quarter of the way, each step, to where its picture shows a dot."""
    space = ActionSpace(
        robot=robot,
        names=(*(f"j{i}" for i in range(joints)), "gripper"),
        units=("rad",) * joints + ("opening",),
        low=(-2.0,) * joints + (0.0,),
        high=(2.0,) * joints + (1.0,),
    )
    staged = []
    for seed, length in enumerate(lengths):
        rng = np.random.default_rng(seed)
        goal, states = rng.uniform(-1, 1, joints + 1), np.zeros((length + 1, joints + 1))
        goal[-1] = float(goal[-1] > 0)
        images = np.full((length, SIDE, SIDE, 3), 40, np.uint8)
        column = int((goal[0] + 1) / 2 * (SIDE - 8))
        for t in range(length):
            states[t + 1] = states[t] + 0.25 * (goal - states[t])
            images[t, 8:16, column : column + 8] = 230
        episode = Episode(
            robot=robot,
            task="reach",
            seed=seed,
            instruction=("reach the dot", "go to the bright dot now")[seed % 2],
            states=states[:-1].astype(np.float32),
            actions=states[1:].astype(np.float32),
            images={"base": images, "wrist": images[:, ::-1]},
        )
        stage_episode(folder / "staging", f"{robot}-{seed}", episode)
        staged.append(folder / "staging" / f"{robot}-{seed}")
    finalize_dataset(
        staged, folder / robot, space=space, cameras=("base", "wrist"), image_size=SIDE, provenance={}
    )
    return open_dataset(folder / robot)


def make_backbone(folder: Path, seed: int = 0) -> Backbone:
    Backbone(*make_nano(seed=seed, layers=2, width=32)).save(folder)
    return Backbone.load(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Backbone, Path, EpisodeDataset]:
    folder = tmp_path_factory.mktemp("intents")
    return make_backbone(folder / "backbone"), folder / "backbone", make_dataset(folder)


@pytest.fixture(scope="module")
def cached(world, tmp_path_factory):
    backbone, source, dataset = world
    folder = tmp_path_factory.mktemp("cache") / "arm"
    return cache_intents(backbone, str(source), dataset, CONFIG, folder), folder


def test_cache_holds_what_a_direct_tap_of_one_frame_gives(world, cached):
    backbone, _, dataset = world
    frames = np.array([45, 0, 19, 60])  # any order, all episodes and shards, two prompt lengths
    rows = cached[0].rows(frames)
    for frame, row in zip(frames, rows, strict=True):
        slow = LiveIntents(backbone, dataset, CONFIG).rows(np.array([frame]))[0]
        assert row.dtype == np.float16 and row.shape == slow.shape
        np.testing.assert_allclose(row, slow, rtol=2e-3, atol=2e-3)
    assert len({len(row) for row in rows}) == 2
    assert len(list(cached[1].glob("*.npy"))) == 2


def test_collate_pads_on_the_right_and_masks_the_padding(cached):
    rows = cached[0].rows(np.array([0, 19]))
    hidden, mask = collate(rows)
    assert mask.sum(1).tolist() == [len(row) for row in rows]
    for i, row in enumerate(rows):
        assert torch.equal(hidden[i][mask[i]], torch.from_numpy(np.array(row)))


def test_reopening_computes_nothing_and_a_killed_run_continues(world, cached):
    backbone, source, dataset = world
    before = {path.name: path.stat().st_mtime_ns for path in cached[1].iterdir()}
    cache_intents(backbone, str(source), dataset, CONFIG, cached[1])
    assert before == {path.name: path.stat().st_mtime_ns for path in cached[1].iterdir()}
    journal = cached[1] / "journal.jsonl"  # killed after the first shard: no manifest, one line
    (cached[1] / "manifest.json").unlink()
    journal.write_text(journal.read_text().splitlines()[0] + "\n")
    (cached[1] / "00001.npy").unlink()
    cache_intents(backbone, str(source), dataset, CONFIG, cached[1])
    after = {path.name: path.stat().st_mtime_ns for path in cached[1].iterdir()}
    assert after["00000.npy"] == before["00000.npy"] and after["00001.npy"] != before["00001.npy"]


def test_a_stale_cache_is_refused_with_what_differs(world, cached, tmp_path):
    backbone, source, dataset = world
    for config, name in (
        (replace(CONFIG, layer=2), "layer"),
        (replace(CONFIG, cameras=("base",)), "prompt, cameras"),
        (replace(CONFIG, stride=2), "stride"),
    ):
        with pytest.raises(BlmError, match=f"stale: made from another {name}; delete the folder or"):
            cache_intents(backbone, str(source), dataset, config, cached[1])
    other = make_backbone(tmp_path / "other", seed=1)
    with pytest.raises(BlmError, match="another backbone;"):
        cache_intents(other, str(tmp_path / "other"), dataset, CONFIG, cached[1])
    more = make_dataset(tmp_path, lengths=(19, 22))
    with pytest.raises(BlmError, match="another dataset;"):
        cache_intents(backbone, str(source), more, CONFIG, cached[1])


def test_an_altered_cache_is_refused(world, tmp_path, capsys):
    backbone, source, dataset = world
    cache_intents(backbone, str(source), dataset, replace(CONFIG, stride=10), tmp_path)
    assert "GB free" in capsys.readouterr().err
    shard = tmp_path / "00000.npy"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BlmError, match=r"00000\.npy is missing or altered; delete"):
        cache_intents(backbone, str(source), dataset, replace(CONFIG, stride=10), tmp_path)


def test_workers_write_the_same_bytes_and_a_stride_keeps_fewer_frames(world, tmp_path):
    backbone, source, dataset = world
    stores = []
    for workers in (0, 1):
        folder = tmp_path / str(workers)
        config = replace(CONFIG, stride=8, workers=workers)
        stores.append(cache_intents(backbone, str(source), dataset, config, folder))
    a, b = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("0", "1"))
    kept = kept_frames(dataset.starts, 8)
    assert [shard["frames"] for shard in a.values()] == [shard["frames"] for shard in b.values()]
    assert [frame for shard in a.values() for frame in shard["frames"]] == kept.tolist()
    for mine, theirs in zip(stores[0].rows(kept), stores[1].rows(kept), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=2e-3)
    with pytest.raises(AssertionError, match="without intents"):
        stores[0].rows(np.array([1]))
