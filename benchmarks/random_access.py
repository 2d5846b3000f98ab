"""Random training samples per second from a dataset: our reader and LeRobot's official reader.

    sh scripts/lerobot.sh && python benchmarks/random_access.py [--dataset FOLDER] [--repeats 12]

A sample is a state, the frames of two cameras, and a chunk of 16 actions with its padding mask, at
a random index. Each reader runs in a separate process and environment with one thread; they take
turns on the same indices of the same files. A repeat gives one ratio; the program prints geometric
means with a 95 % interval (Student's t of the logarithms). The official reader returns float CHW
tensors, ours uint8 HWC arrays. Without --dataset, 15 episodes of PushCube are collected first with
images of --size pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

IndexArray = NDArray[np.int64]
Read = Callable[[IndexArray], None]
HORIZON, CAMERAS = 16, 2
WARM_UP = 32
OFFICIAL = Path(__file__).parents[1] / ".venv-lerobot/bin/python"


def ours(folder: Path) -> tuple[Read, int]:
    """Return a function that reads the samples of an array of indices, and the number of frames."""
    from blm.datasets.lerobot import open_dataset
    from blm.datasets.transforms import action_chunks

    data = open_dataset(folder)
    ends = data.starts[data.episode_index + 1]

    def read(indices: IndexArray) -> None:
        for camera in data.cameras[:CAMERAS]:
            data.frames(indices, camera)
        data.states[indices]
        action_chunks(data.actions, indices, ends[indices], HORIZON)

    return read, data.num_frames


def lerobot(folder: Path) -> tuple[Read, int]:
    import torch
    import torchvision_operators  # noqa: F401  must come before torchvision, see scripts/lerobot.sh
    from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata

    torch.set_num_threads(1)
    meta = LeRobotDatasetMetadata("local/benchmark", root=folder)
    for key in meta.video_keys[CAMERAS:]:
        del meta.info["features"][key]  # as many cameras as the other reader
    data = LeRobotDataset(
        "local/benchmark",
        root=folder,
        delta_timestamps={"action": [i / meta.fps for i in range(HORIZON)]},
        video_backend="torchcodec",
    )
    data.meta = meta
    assert sum(key in data[0] for key in meta.camera_keys) == CAMERAS and len(data[0]["action"]) == HORIZON

    def read(indices: IndexArray) -> None:
        for i in indices:
            data[int(i)]

    return read, len(data)


def serve(reader: str, folder: Path) -> None:
    """Answer each line [batch size, indices] with the seconds that reading them took."""
    read, count = {"ours": ours, "lerobot": lerobot}[reader](folder)
    read(np.arange(min(WARM_UP, count)))
    print(count, flush=True)
    for line in sys.stdin:
        batch, numbers = json.loads(line)
        batches = np.split(np.array(numbers), range(batch, len(numbers), batch))
        began = time.perf_counter()
        for indices in batches:
            read(indices)
        print(time.perf_counter() - began, flush=True)


class Reader:
    """A reader in its own process."""

    def __init__(self, name: str, python: Path, folder: Path) -> None:
        command = [str(python), __file__, "--serve", name, "--dataset", str(folder)]
        quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, text=True, env=os.environ | quiet, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdin and self.process.stdout
        self.input, self.output = self.process.stdin, self.process.stdout
        self.count = int(self._answer())

    def _answer(self) -> str:
        if not (line := self.output.readline()):
            raise SystemExit("a reader stopped; its error is above")
        return line

    def rate(self, batch: int, indices: np.ndarray) -> float:
        """Return samples per second."""
        self.input.write(json.dumps([batch, indices.tolist()]) + "\n")
        self.input.flush()
        return len(indices) / float(self._answer())

    def close(self) -> None:
        self.input.close()
        self.process.wait()


def interval(values: np.ndarray) -> str:
    """Return the geometric mean with its 95 % interval."""
    from scipy.stats import t

    logs = np.log(values)
    half = t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    mean, low, high = np.exp([logs.mean(), logs.mean() - half, logs.mean() + half])
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]" if mean < 100 else f"{mean:.0f} [{low:.0f}, {high:.0f}]"


def compare(folder: Path, repeats: int, samples: int) -> None:
    readers = [Reader("ours", Path(sys.executable), folder), Reader("lerobot", OFFICIAL, folder)]
    rng = np.random.default_rng(0)
    print("| samples at a time | ours [samples/s] | LeRobot [samples/s] | ratio |\n|---|---|---|---|")
    for batch in (1, 32):
        rates = np.zeros((repeats, 2))
        for repeat in range(repeats):
            indices = rng.integers(0, readers[0].count, samples)
            for which in (0, 1) if repeat % 2 else (1, 0):
                rates[repeat, which] = readers[which].rate(batch, indices)
        cells = [interval(rates[:, 0]), interval(rates[:, 1]), interval(rates[:, 0] / rates[:, 1])]
        print(f"| {batch} | {' | '.join(cells)} |", flush=True)
    for reader in readers:
        reader.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path, help="folder of one robot's dataset")
    parser.add_argument(
        "--size", type=int, default=224, help="width and height of the images of the collected dataset [px]"
    )
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--samples", type=int, default=128, help="samples per repeat")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.dataset)
        return
    if not OFFICIAL.exists():
        raise SystemExit("no .venv-lerobot; run: sh scripts/lerobot.sh")
    with tempfile.TemporaryDirectory() as scratch:
        if not args.dataset:
            from blm.planner import CollectConfig, collect

            config = CollectConfig(
                robots=("panda",),
                tasks=("push_cube",),
                episodes=15,
                cameras=("base", "wrist"),
                image_size=args.size,
            )
            collect(config, Path(scratch))
        folder = args.dataset or Path(scratch) / "panda"
        info = json.loads((folder / "meta/info.json").read_text())
        load = "/".join(f"{value:.1f}" for value in os.getloadavg())
        print(f"{info['total_frames']} frames, {os.cpu_count()} cores, load {load}\n")
        compare(folder, args.repeats, args.samples)


if __name__ == "__main__":
    main()
