"""The dataset format: round trip, exact frames, order independence, refusals of damaged folders."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest

from blm.datasets import video
from blm.datasets.lerobot import open_dataset, stage_episode
from blm.datasets.statistics import Stats, compute_stats, histogram_stats, image_histogram
from blm.types import BlmError, ContractError
from tests.support.episodes import EPISODES, SIDE, SPACE, make_episode, numbered_frames, write


@pytest.fixture
def folder(tmp_path):
    """A dataset to damage."""
    return write(tmp_path, EPISODES)


def read_numbers(frames):
    block = SIDE // 4
    centres = frames[:, block // 2 :: block, block // 2 :: block, 0] > 125
    return [int(sum(int(bit) << k for k, bit in enumerate(grid.ravel()))) for grid in centres]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("written"), EPISODES)


@pytest.fixture
def dataset(written):
    return open_dataset(written)


# --- statistics and video ---


def test_stats_are_the_quantiles_of_all_rows():
    values = np.random.default_rng(0).exponential(size=(501, 2))
    stats = compute_stats(values)
    assert stats.count == 501
    np.testing.assert_allclose(stats.q01, np.sort(values, axis=0)[5])
    np.testing.assert_allclose(stats.q50, np.median(values, axis=0))
    np.testing.assert_allclose([stats.min, stats.max], [values.min(0), values.max(0)])
    with pytest.raises(BlmError, match=r"\[N, D\]"):
        compute_stats(np.zeros((0, 2)))


def test_histogram_stats_equal_direct_ones():
    frames = np.random.default_rng(0).integers(20, 200, (5, 8, 8, 3)).astype(np.uint8)
    stats = histogram_stats(image_histogram(frames))
    pixels = frames.reshape(-1, 3) / 255
    assert stats.mean.shape == (3, 1, 1)
    assert stats.count == len(pixels)
    np.testing.assert_allclose(stats.mean.ravel(), pixels.mean(0))
    np.testing.assert_allclose(stats.std.ravel(), pixels.std(0))
    np.testing.assert_allclose([stats.min.ravel(), stats.max.ravel()], [pixels.min(0), pixels.max(0)])
    np.testing.assert_allclose(stats.q90.ravel(), np.quantile(pixels, 0.9, axis=0), atol=1 / 255)


def test_random_access_gives_the_exact_frame_of_sequential_reading(tmp_path):
    frames = numbered_frames(list(range(60)))
    video.encode(tmp_path / "a.mp4", frames, 20)
    sequential = video.VideoFile(tmp_path / "a.mp4")
    in_order = np.stack([sequential.read(i) for i in range(60)])
    assert read_numbers(in_order) == list(range(60))
    assert np.abs(in_order.astype(int) - frames).mean() < 2.0
    random_file = video.VideoFile(tmp_path / "a.mp4")
    for i in [59, 0, 31, 30, 32, 35, 35, 7, 58, 59]:
        np.testing.assert_array_equal(random_file.read(i), in_order[i])
    with pytest.raises(BlmError, match="no frame 60"):
        random_file.read(60)
    np.testing.assert_array_equal(random_file.read(59), in_order[59])


def test_joined_videos_hold_the_same_pictures_as_their_pieces(tmp_path):
    pieces = [tmp_path / f"{i}.mp4" for i in range(3)]
    for i, piece in enumerate(pieces):
        video.encode(piece, numbered_frames(list(range(10 * i, 10 * i + 5 + i))), 20)
    video.concatenate(pieces, tmp_path / "all.mp4")
    assert video.count_frames(tmp_path / "all.mp4") == 18
    joined = video.VideoFile(tmp_path / "all.mp4")
    separate = [video.VideoFile(piece) for piece in pieces]
    expected = [separate[i].read(k) for i in range(3) for k in range(5 + i)]
    for i in np.random.default_rng(0).permutation(18):
        np.testing.assert_array_equal(joined.read(int(i)), expected[i])


def test_odd_frame_sizes_are_refused(tmp_path):
    with pytest.raises(BlmError, match="even"):
        video.encode(tmp_path / "a.mp4", np.zeros((2, 33, 32, 3), np.uint8), 20)


# --- round trip ---


def test_episodes_come_back_ordered_by_task_and_seed(dataset):
    assert dataset.tasks == ("pick", "push", "push")
    assert dataset.seeds == (2, 1, 3)
    assert (dataset.num_episodes, dataset.num_frames) == (3, 28)
    for i, original in enumerate([EPISODES[2], EPISODES[1], EPISODES[0]]):
        episode = dataset.episode(i)
        np.testing.assert_array_equal(episode.states, original.states)
        np.testing.assert_array_equal(episode.actions, original.actions)
        done = original.actions if original.executed is None else original.executed
        np.testing.assert_array_equal(episode.executed, done)
        same = ("robot", "task", "seed", "instruction", "primitives", "success", "metrics")
        assert [getattr(episode, k) for k in same] == [getattr(original, k) for k in same]
        assert read_numbers(episode.images["base"]) == [original.seed * 100 + t for t in range(len(original))]
        for camera, frames in original.images.items():
            assert np.abs(episode.images[camera].astype(int) - frames).mean() < 2.0
        assert dataset.episode(i, cameras=()).images == {}


def test_frames_in_any_order_match_the_sequential_pass(dataset):
    everything = dataset.frames(np.arange(28), "base")
    chosen = np.random.default_rng(1).integers(0, 28, 40)
    np.testing.assert_array_equal(dataset.frames(chosen, "base"), everything[chosen])
    assert read_numbers(dataset.frames([27, 0], "base")) == [308, 200]


def test_columns_describe_each_frame(dataset):
    per_frame = [dataset.instructions[i] for i in dataset.task_index]
    assert per_frame == ["pick"] * 7 + ["move it"] * 12 + ["push it"] * 9
    assert dataset.primitives[:7].tolist() == ["approach"] * 4 + ["push"] * 3
    assert dataset.success[:7].tolist() == [False] * 3 + [True] * 4
    np.testing.assert_allclose(dataset.stats["action"].q99, np.quantile(dataset.actions, 0.99, axis=0))
    executed = np.quantile(dataset.executed, 0.1, axis=0)
    np.testing.assert_allclose(dataset.stats["executed_action"].q10, executed)


def test_same_episodes_give_the_same_bytes_in_any_order_and_again(written, tmp_path):
    other = write(tmp_path, EPISODES[::-1])
    files = sorted(p.relative_to(written) for p in written.rglob("*") if p.is_file())
    for _ in range(2):
        assert files == sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
        for name in files:
            assert (written / name).read_bytes() == (other / name).read_bytes(), name
        assert open_dataset(written).content_hash == open_dataset(other).content_hash
        write(tmp_path, EPISODES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["arm", "staging"]


def test_layout_is_lerobot_v3(written):
    info = json.loads((written / "meta/info.json").read_text())
    assert (info["codebase_version"], info["robot_type"], info["fps"]) == ("v3.0", "arm", 20)
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 28, 3)
    data = pq.read_table(written / info["data_path"].format(chunk_index=0, file_index=0))
    for name in data.column_names:
        assert name in info["features"]
    assert str(data.schema.field("action").type) == "fixed_size_list<element: float>[3]"
    episodes = pq.read_table(written / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    stats = json.loads((written / "meta/stats.json").read_text())
    for name in info["features"]:
        assert set(stats[name]) == {field.name for field in dataclasses.fields(Stats)}
        assert f"stats/{name}/q50" in episodes[0]
    assert np.shape(stats["observation.images.base"]["mean"]) == (3, 1, 1)
    second = episodes[1]
    key = "videos/observation.images.wrist"
    assert (second["dataset_from_index"], second["dataset_to_index"], second["length"]) == (7, 19, 12)
    assert second[f"{key}/from_timestamp"] == pytest.approx(0.35)
    assert second[f"{key}/to_timestamp"] == pytest.approx(0.95)
    tasks = pq.read_table(written / "meta/tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["__index_level_0__"]
    assert tasks.column_names == ["task_index", "__index_level_0__"]
    modality = json.loads((written / "meta/modality.json").read_text())
    assert modality["action"] == {"arm": {"start": 0, "end": 2}, "gripper": {"start": 2, "end": 3}}


def test_staging_replaces_and_leaves_no_half_written_folder(tmp_path):
    stage_episode(tmp_path, "push/1", make_episode(1, 9))
    stage_episode(tmp_path, "push/1", make_episode(1, 5))
    assert [p.name for p in (tmp_path / "push").iterdir()] == ["1"]
    assert video.count_frames(tmp_path / "push/1/base.mp4") == 5


# --- refusals ---


def test_bad_episodes_are_refused(tmp_path):
    good = make_episode(1, 6)
    states = good.states.copy()
    states[2, 1] = np.nan
    with pytest.raises(ContractError, match="states hold a value that is not finite"):
        stage_episode(tmp_path, "a", dataclasses.replace(good, states=states))
    with pytest.raises(ContractError, match="differ in length"):
        stage_episode(tmp_path, "a", dataclasses.replace(good, actions=good.actions[:-1]))
    with pytest.raises(ContractError, match="differ in length"):
        stage_episode(tmp_path, "a", dataclasses.replace(good, executed=good.actions[:-1]))
    with pytest.raises(ContractError, match="differ in shape"):
        stage_episode(tmp_path, "a", dataclasses.replace(good, executed=good.actions[:, :2]))
    with pytest.raises(ContractError, match="executed hold a value that is not finite"):
        stage_episode(tmp_path, "a", dataclasses.replace(good, executed=states))
    with pytest.raises(ContractError, match="robot 'other'"):
        write(tmp_path, [dataclasses.replace(good, robot="other")])
    with pytest.raises(BlmError, match="no episode"):
        write(tmp_path, [])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"space": dataclasses.replace(SPACE, high=(2.0, 1.0, 1.0))},
            r"high: \(2.0, .* here, \(1.0, 1.0, 1.0\)",
        ),
        ({"cameras": ("base", "side")}, r"has cameras .*lacks side"),
        ({"image_size": 112}, "image size is 64, 112 is needed"),
        ({"rate_hz": 10.0}, "rate"),
    ],
)
def test_require_prints_both_sides(dataset, change, said):
    needs = {"space": SPACE, "cameras": ("base",), "image_size": SIDE, "rate_hz": 20.0}
    dataset.require(**needs)
    with pytest.raises(ContractError, match=said):
        dataset.require(**needs | change)
    with pytest.raises(ContractError, match="lacks side"):
        dataset.frames([0], "side")


def test_damaged_videos_are_named(folder):
    path = next(folder.glob("videos/*base/*/*.mp4"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BlmError, match=r"base.*cannot be read.*restore the file"):
        open_dataset(folder)
    video.encode(path.with_suffix(".short.mp4"), numbered_frames([0, 1]), 20)
    path.with_suffix(".short.mp4").replace(path)
    with pytest.raises(BlmError, match="has 2 frames, its episodes need 28"):
        open_dataset(folder)


def test_not_finite_values_and_foreign_statistics_are_found(folder):
    path = folder / "meta/stats.json"
    whole, stats = path.read_text(), json.loads(path.read_text())
    stats["action"]["max"][1] += 0.5
    path.write_text(json.dumps(stats))
    with pytest.raises(BlmError, match="does not belong to these frames"):
        open_dataset(folder)
    path.write_text(whole)
    path = next(folder.glob("data/*/*.parquet"))
    data, value = path.read_bytes(), open_dataset(folder).states[20].tobytes()
    assert data.count(value) == 1
    path.write_bytes(data.replace(value, np.full(3, np.nan, np.float32).tobytes()))
    with pytest.raises(BlmError, match="not finite in 1 frames, in episodes 2"):
        open_dataset(folder)


def test_foreign_versions_and_missing_folders_are_refused(folder):
    with pytest.raises(BlmError, match="no dataset at"):
        open_dataset(folder / "nothing")
    path = folder / "meta/info.json"
    info = json.loads(path.read_text())
    for change in ({"codebase_version": "v2.1"}, {"blm": {}}):
        path.write_text(json.dumps(info | change))
        with pytest.raises(BlmError, match="this program reads"):
            open_dataset(folder)


def test_threads_that_read_one_video_get_their_own_frames(tmp_path):
    """Training reads a batch ahead while an evaluation reads: one open file has one place."""
    data = open_dataset(write(tmp_path, EPISODES))
    expected = data.frames(range(data.num_frames), "base")
    wrong = []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(40):
            rows = rng.integers(0, data.num_frames, 4)
            if not np.array_equal(data.frames(rows, "base"), expected[rows]):
                wrong.append(rows)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    assert not wrong
