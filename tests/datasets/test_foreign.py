"""LeRobotDatasets of other programs: v3.0 in several files, v2.1, v2.0; what is unknown, what is refused."""

from __future__ import annotations

import json
from fractions import Fraction

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blm.datasets import video
from blm.datasets.lerobot import open_dataset
from blm.types import BlmError, ContractError
from tests.support.foreign_datasets import (
    ACTIONS,
    FPS,
    NAMES,
    SHAPES,
    STARTS,
    STATES,
    TEXTS,
    features,
    picture,
    write_v2,
    write_v3,
)

WRITERS = {"v2.1": write_v2, "v2.0": lambda folder: write_v2(folder, "v2.0"), "v3.0": write_v3}


@pytest.mark.parametrize("version", WRITERS)
def test_foreign_datasets_are_read_whole(tmp_path, version):
    dataset = open_dataset(WRITERS[version](tmp_path))
    assert (dataset.num_episodes, dataset.num_frames) == (4, 27)
    np.testing.assert_array_equal(dataset.states, STATES)
    np.testing.assert_array_equal(dataset.actions, ACTIONS)
    np.testing.assert_array_equal(dataset.executed, ACTIONS)
    np.testing.assert_array_equal(dataset.starts, STARTS)
    np.testing.assert_allclose(dataset.stats["action"].q01, np.quantile(ACTIONS, 0.01, axis=0), rtol=1e-5)
    assert dataset.image_shapes == {"top": (48, 64), "observation.image": (32, 32)}
    with pytest.raises(ContractError, match=r"'top': \(48, 64\)"):
        _ = dataset.image_size
    for camera, key in zip(dataset.cameras, SHAPES, strict=True):
        order = np.random.default_rng(1).permutation(27)
        frames = dataset.frames(order, camera)
        expected = np.stack([picture(key, i) for i in order])
        assert frames.shape == expected.shape
        assert np.abs(frames.astype(int) - expected).max() <= 3
    episode = dataset.episode(2)
    assert episode.instruction == TEXTS[0] and episode.images["top"].shape == (9, 48, 64, 3)
    assert np.abs(episode.images["top"][0].astype(int) - (20 + 8 * 12)).max() <= 3


@pytest.mark.parametrize("version", WRITERS)
def test_missing_information_is_marked_unknown(tmp_path, version):
    dataset = open_dataset(WRITERS[version](tmp_path))
    space = dataset.space
    assert (space.robot, space.names, space.rate_hz) == ("gantry", tuple(NAMES), 10.0)
    assert (space.kind, space.units) == ("unknown", ("unknown",) * 3)
    assert {*space.low} == {-np.inf} and {*space.high} == {np.inf}, "limits are the robot's, not the data's"
    assert (set(dataset.seeds), set(dataset.tasks), set(dataset.primitives)) == (
        {-1},
        {"unknown"},
        {"unknown"},
    )
    assert not dataset.success.any() and dataset.provenance == {} and len(dataset.content_hash) == 64


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, ("0", "1", "2")),
        (["a", "b", "c"], ("a", "b", "c")),
        ({"b": 1, "c": 2, "a": 0}, ("a", "b", "c")),
        ({"left": ["a", "b"], "right": ["c"]}, ("a", "b", "c")),
        ({"left": ["a", "b"], "right": ["a"]}, ("left.a", "left.b", "right.a")),
        ([["a", "b", "c"]], ("a", "b", "c")),
        (["actions"], ("0", "1", "2")),
    ],
)
def test_names_of_actions_in_all_their_forms(tmp_path, names, expected):
    action = {"dtype": "float32", "shape": [3], "names": names}
    assert open_dataset(write_v2(tmp_path, features=features(action=action))).space.names == expected


def change(folder, name, edit):
    """Rewrite one file of a dataset: `edit` takes and gives text, or an Arrow table."""
    path = folder / name
    if path.suffix == ".parquet":
        pq.write_table(edit(pq.read_table(path)), path)
    else:
        path.write_text(edit(path.read_text()))


def replaced(name, values):
    return lambda table: table.set_column(table.column_names.index(name), name, pa.array(values))


VECTOR = {"dtype": "float32", "shape": [3], "names": None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codebase_version": "v1.6"}, r"is a LeRobotDataset v1\.6; this program reads v3\.0, v2\.1, v2\.0"),
        ({"features": {"observation.state": VECTOR}}, r"lacks an action under .* numbers are observation"),
        ({"features": features(action=VECTOR | {"shape": [4]})}, "is number 3 of 'action', which has 3"),
        ({"video_path": "../{video_key}.mp4"}, "outside of the dataset"),
        ({"fps": 20}, r"timestamps are not those of 20 Hz in .* frames, in episodes 0, 1, 2, 3"),
        ({"chunks_size": 2}, r"episode_000002\.parquet' cannot be read"),
        ({"data_path": None}, r"info\.json' cannot be read"),
    ],
)
def test_ambiguous_descriptions_are_refused(tmp_path, changes, said):
    with pytest.raises(BlmError, match=said):
        open_dataset(write_v2(tmp_path, **changes))


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        (
            "meta/episodes.jsonl",
            lambda t: t.replace('index": 3', 'index": 4'),
            r"episode_000004\.parquet' cannot be read",
        ),
        (
            "meta/episodes.jsonl",
            lambda t: t.replace('"length": 9', '"length": 8'),
            "holds 27 frames, .* need 26",
        ),
        (
            "meta/episodes.jsonl",
            lambda t: t.replace('"length"', '"size"'),
            r"episodes\.jsonl' lacks 'length'",
        ),
        ("meta/tasks.jsonl", lambda t: t.replace('index": 1', 'index": 2'), r"meta/tasks lacks: \[1\]"),
        ("meta/tasks.jsonl", lambda t: t.splitlines()[0], "name a task_index that meta/tasks lacks"),
        ("data/chunk-000/episode_000001.parquet", replaced("frame_index", [0, 1, 3, 2, 4]), "row 9 is 3"),
        (
            "data/chunk-000/episode_000001.parquet",
            replaced("action", [[1.0]] * 5),
            "cannot be read|dimension",
        ),
        ("data/chunk-000/episode_000001.parquet", lambda t: t.drop_columns("action"), "cannot be read"),
        (
            "data/chunk-000/episode_000001.parquet",
            replaced("action", [[1.0, 2.0, 3.0]] * 4 + [[1.0, float("nan"), 0.0]]),
            "action is not finite in 1 frames, in episodes 1; fix it with",
        ),
    ],
)
def test_damage_is_named(tmp_path, name, edit, said):
    change(write_v2(tmp_path), name, edit)
    with pytest.raises(BlmError, match=said):
        open_dataset(tmp_path)


def test_damage_of_v3_is_named(tmp_path):
    name = "meta/episodes/chunk-000/file-001.parquet"
    key = "videos/observation.images.top/from_timestamp"
    for i, (column, values, said) in enumerate(
        [
            (key, [1.25, 0.0], "start between two frames"),
            ("dataset_from_index", [12, 20], "do not follow one another"),
            ("data/chunk_index", [7, 7], r"chunk-007/file-000\.parquet' cannot be read"),
        ]
    ):
        change(write_v3(tmp_path / str(i)), name, replaced(column, values))
        with pytest.raises(BlmError, match=said):
            open_dataset(tmp_path / str(i))


def test_missing_and_short_videos_are_named(tmp_path):
    path = next(write_v2(tmp_path).glob("videos/chunk-001/*top/*.mp4"))
    whole = path.read_bytes()
    video.encode(path, np.zeros((4, 48, 64, 3), np.uint8), FPS)
    with pytest.raises(BlmError, match=r"episode_000003\.mp4' has 4 frames, its episodes need 6"):
        open_dataset(tmp_path)
    path.write_bytes(whole[:-900])
    with pytest.raises(BlmError, match=r"episode_000003\.mp4' cannot be read"):
        open_dataset(tmp_path)
    path.unlink()
    with pytest.raises(BlmError, match=r"episode_000003\.mp4' is missing"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("options", [{"g": "12", "bf": "2"}, {"g": "250", "bf": "0"}, {"g": "2", "bf": "0"}])
def test_exact_frames_of_videos_with_other_settings(tmp_path, options):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(80):
            grey = np.full((32, 32, 3), 10 + 3 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, "rgb24")))
        container.mux(stream.encode())
    assert video.probe(path) == (80, 30.0, (32, 32)) and video.decodable_frames(path) == 80
    file = video.VideoFile(path)
    for i in [*np.random.default_rng(0).permutation(80), *range(80), 79, 79, 0]:
        assert abs(int(file.read(int(i)).mean()) - (10 + 3 * i)) <= 1, i


def test_frames_of_uneven_times_are_counted_in_their_order(tmp_path):
    path, rng = tmp_path / "a.mp4", np.random.default_rng(0)
    times = np.cumsum(rng.integers(400, 1600, 40))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"g": "8", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 32, 32, "yuv420p", Fraction(1, 30_000)
        stream.codec_context.time_base = Fraction(1, 30_000)
        for i, time in enumerate(times.tolist()):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 + 5 * i, np.uint8), "rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 30_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    file = video.VideoFile(path, by_order=True)
    for i in [*np.random.default_rng(1).permutation(40), *range(40), 39, 0]:
        assert abs(int(file.read(int(i)).mean()) - (10 + 5 * i)) <= 2, i


def test_parts_of_state_and_action_in_features_of_their_own_are_joined(tmp_path):
    folder = write_v2(tmp_path)
    arm, hand = VECTOR | {"shape": [2], "names": ["x", "y"]}, VECTOR | {"shape": [1]}
    parts = {"observation.state.arm": arm, "action.arm": arm, "action.gripper_position": hand}
    for path in folder.rglob("episode_*.parquet"):
        table = pq.read_table(path)
        state, action = (np.array(table[name].to_pylist()) for name in ("observation.state", "action"))
        table = table.drop_columns(["observation.state", "action", "timestamp"])
        stamps = [[i / FPS] for i in range(len(table))]
        for name, values in (
            ("observation.state.arm", state[:, :2].tolist()),
            ("action.arm", action[:, :2].tolist()),
            ("action.gripper_position", action[:, 2:].tolist()),
            ("timestamp", stamps),
        ):
            table = table.append_column(name, pa.array(values, pa.list_(pa.float32())))
        pq.write_table(table, path)
    info = json.loads((folder / "meta/info.json").read_text())
    kept = {k: v for k, v in info["features"].items() if k not in ("observation.state", "action")}
    (folder / "meta/info.json").write_text(json.dumps({**info, "features": {**parts, **kept}}))
    dataset = open_dataset(folder)
    np.testing.assert_array_equal(dataset.states, STATES[:, :2])
    np.testing.assert_array_equal(dataset.actions, ACTIONS)
    assert dataset.space.names == ("x", "y", "gripper_position") and dataset.space.state_names == ("x", "y")
