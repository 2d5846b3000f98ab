"""The official LeRobot package reads our datasets and we read its own. Needs `sh scripts/lerobot.sh` once."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from blm.datasets.lerobot import open_dataset
from blm.datasets.transforms import action_chunks
from blm.planner import CollectConfig, collect
from tests.support.foreign_datasets import LENGTHS, SHAPES, rows, write_v2

PYTHON = Path(__file__).parents[2] / ".venv-lerobot/bin/python"
HORIZON = 16
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists(),
        reason="no .venv-lerobot: run 'sh scripts/lerobot.sh' to install the official LeRobot there",
    ),
]

READ = """
import sys, json, numpy as np, torchvision_operators
from lerobot.datasets.lerobot_dataset import LeRobotDataset
folder, out, horizon = sys.argv[1], sys.argv[2], int(sys.argv[3])
probe = LeRobotDataset("local/check", root=folder)
chunk = [i / probe.fps for i in range(horizon)]
times = {"action": chunk}
data = LeRobotDataset("local/check", root=folder, delta_timestamps=times, video_backend="torchcodec")
items = [data[i] for i in range(len(data))]
keys = ["observation.state", "executed_action", "action", "action_is_pad", "timestamp", "episode_index",
        "next.success", *data.meta.video_keys]
np.savez(out, **{key: np.stack([item[key].numpy() for item in items]) for key in keys})
texts = {name: [item[name] for item in items] for name in ("task", "subtask")}
facts = {"episodes": data.num_episodes, "fps": data.fps, "cameras": list(data.meta.camera_keys),
         "robot": data.meta.robot_type}
print(json.dumps(texts | facts))
"""

WRITE = """
import sys, numpy as np, torchvision_operators
from lerobot.datasets.lerobot_dataset import LeRobotDataset
names = ["a.pos", "b.pos", "hand.pos"]
vector = {"dtype": "float32", "shape": (3,), "names": names}
video = {"dtype": "video", "shape": (48, 64, 3), "names": ["height", "width", "channels"]}
data = LeRobotDataset.create("local/theirs", fps=10, root=sys.argv[1], robot_type="gantry", features={
    "observation.state": vector, "action": vector, "observation.images.top": video})
rng, count = np.random.default_rng(0), 0
for episode, length in enumerate((12, 9, 15)):
    for t in range(length):
        image = np.full((48, 64, 3), 20 + 6 * count, np.uint8)
        image[:, :32] //= 2
        count += 1
        data.add_frame({"observation.state": rng.normal(size=3).astype(np.float32),
                        "action": rng.normal(size=3).astype(np.float32),
                        "observation.images.top": image, "task": "open" if episode != 1 else "close"})
    data.save_episode()
data.finalize()
"""


def official(code, *arguments):
    """Run code in LeRobot's environment; return what it printed last."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(PYTHON), "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip().rpartition("\n")[2]


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collected")
    config = CollectConfig(
        robots=("panda",), tasks=("push_cube",), episodes=3, image_size=64, noise=(0.02,), workers=0
    )
    collect(config, folder)
    return open_dataset(folder / "panda")


@pytest.fixture(scope="module")
def theirs(collected, tmp_path_factory):
    """What LeRobot reads from our dataset: arrays by feature, and facts."""
    out = tmp_path_factory.mktemp("theirs") / "items.npz"
    facts = json.loads(official(READ, collected.folder, out, HORIZON))
    return dict(np.load(out)) | facts


def test_official_reader_returns_the_same_vectors_and_texts(collected, theirs):
    np.testing.assert_array_equal(theirs["observation.state"], collected.states)
    np.testing.assert_array_equal(theirs["executed_action"], collected.executed)
    assert not np.array_equal(collected.executed, collected.actions)
    np.testing.assert_array_equal(theirs["timestamp"], collected.timestamps)
    np.testing.assert_array_equal(theirs["episode_index"], collected.episode_index)
    np.testing.assert_array_equal(theirs["next.success"].ravel(), collected.success)
    assert theirs["task"] == [collected.instructions[i] for i in collected.task_index]
    assert theirs["subtask"] == collected.primitives.tolist()
    assert (theirs["episodes"], theirs["fps"], theirs["robot"]) == (3, 20, "panda")
    assert theirs["cameras"] == [f"observation.images.{camera}" for camera in collected.cameras]


def test_official_reader_returns_the_same_chunks_and_padding(collected, theirs):
    frames = np.arange(collected.num_frames)
    ends = collected.starts[collected.episode_index + 1]
    chunks, inside = action_chunks(collected.actions, frames, ends, HORIZON)
    np.testing.assert_array_equal(theirs["action"], chunks)
    np.testing.assert_array_equal(theirs["action_is_pad"], ~inside)


def test_official_reader_returns_the_same_frames(collected, theirs):
    for camera in collected.cameras:
        ours = collected.frames(np.arange(collected.num_frames), camera)
        official_frames = 255 * theirs[f"observation.images.{camera}"].transpose(0, 2, 3, 1)
        errors = np.abs(official_frames - ours).mean(axis=(1, 2, 3))
        print(f"{camera}: mean abs error {errors.mean():.3f}/255, worst frame {errors.max():.3f}/255")
        assert errors.max() <= 2


def test_we_read_what_the_official_writer_wrote(tmp_path):
    official(WRITE, tmp_path / "theirs")
    dataset = open_dataset(tmp_path / "theirs")
    assert (dataset.num_episodes, dataset.num_frames, dataset.space.rate_hz) == (3, 36, 10.0)
    assert dataset.space.names == ("a.pos", "b.pos", "hand.pos") and dataset.space.robot == "gantry"
    assert [dataset.episode(i, cameras=()).instruction for i in range(3)] == ["open", "close", "open"]
    vectors = np.random.default_rng(0).normal(size=(36, 2, 3)).astype(np.float32)
    np.testing.assert_array_equal(np.stack([dataset.states, dataset.actions], axis=1), vectors)
    assert dataset.image_shapes == {"top": (48, 64)}
    order = np.random.default_rng(1).permutation(36)
    frames = dataset.frames(order, "top").astype(int)
    np.testing.assert_allclose(frames[:, :, 34:].mean(axis=(1, 2, 3)), 20 + 6 * order, atol=2)


CONVERT = """
import sys, pathlib, torchvision_operators
import lerobot.datasets.v30.convert_dataset_v21_to_v30 as converter
converter.convert_dataset("local/theirs", root=pathlib.Path(sys.argv[1]), push_to_hub=False)
"""


def test_we_read_v2_and_the_output_of_the_official_converter(tmp_path):
    ours = write_v2(tmp_path / "v2")
    totals = {"episodes": len(LENGTHS), "frames": sum(LENGTHS), "tasks": 2, "videos": 8, "chunks": 2}
    counts = {f"total_{name}": count for name, count in totals.items()} | {"splits": {"train": "0:4"}}
    copy = write_v2(tmp_path / "local/theirs", **counts)
    lines = []
    for i, length in enumerate(LENGTHS):
        columns = {name: np.array(column.to_pylist(), float) for name, column in rows(i).items()}
        values = {name: column.reshape(length, -1) for name, column in columns.items()}
        values |= {key: np.full((length, 3, 1, 1), 0.5) for key in SHAPES}
        stats = {
            name: {kind: getattr(value, kind)(axis=0).tolist() for kind in ("min", "max", "mean", "std")}
            | {"count": [length]}
            for name, value in values.items()
        }
        lines.append(json.dumps({"episode_index": i, "stats": stats}) + "\n")
    (copy / "meta/episodes_stats.jsonl").write_text("".join(lines))
    official(CONVERT, tmp_path)
    old, new = open_dataset(ours), open_dataset(copy)
    assert (old.info["codebase_version"], new.info["codebase_version"]) == ("v2.1", "v3.0")
    for name in ("states", "actions", "timestamps", "episode_index", "starts"):
        np.testing.assert_array_equal(getattr(old, name), getattr(new, name))
    assert (old.space, old.image_shapes) == (new.space, new.image_shapes)
    texts = [[data.instructions[i] for i in data.task_index] for data in (old, new)]
    assert texts[0] == texts[1]
    for camera in old.cameras:
        frames = [data.frames(np.arange(sum(LENGTHS)), camera) for data in (old, new)]
        np.testing.assert_array_equal(*frames)
