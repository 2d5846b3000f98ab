"""Reading the frames of a clip by seeking against decoding the clip once: the ratio of times.

    python benchmarks/video_frames.py [--clips 20] [--seconds 20] [--gop 250] [--folder VIDEOS]

Each clip is read both ways in turn, for frames from the middles of equal parts of it, as questions
about a clip show them. `decode` converts every frame up to the last wanted one to RGB, `one_pass` only the
wanted frames (what a file that cannot be sought costs). Without --folder, clips of smoothly moving noise are
encoded first (H.264 as x264 encodes by default: a key frame at most every 250 frames, B-frames). Every
clip gives one ratio; the interval is the 95 % t-interval of the mean logarithm over the clips.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import tyro
from rich.progress import track
from scipy.stats import t as student

from blm.evaluation.results import this_machine
from blm.media import VIDEOS, _frames_at, read_frames, video_seconds
from blm.types import ImageArray


@dataclass(frozen=True)
class Options:
    clips: int = 20
    """Clips that are encoded, and at most this many of `folder`."""
    seconds: float = 20.0
    """Length of an encoded clip."""
    width: int = 640
    height: int = 480
    rate: int = 30
    gop: int = 250
    """Frames from one key frame to the next at most; x264's default."""
    frames: int = 8
    """Frames that are read of each clip."""
    folder: Path | None = None
    """Videos to read instead."""


def write_clip(path: Path, seed: int, options: Options) -> Path:
    """Encode an image of noise, blurred, that moves one pixel a frame."""
    rng = np.random.default_rng(seed)
    height, width = options.height, options.width
    coarse = rng.integers(0, 256, (height // 16 + 1, width // 8 + 1, 3), dtype=np.uint8)
    wide = np.repeat(np.repeat(coarse, 16, axis=0), 16, axis=1)[:height]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=options.rate, options={"g": str(options.gop)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(round(options.seconds * options.rate)):
            at = number % (wide.shape[1] - width)
            picture = np.ascontiguousarray(wide[:, at : at + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path


def decode(path: Path, times: list[float]) -> list[ImageArray]:
    """Convert every frame up to the last wanted one to RGB."""
    frames = list[tuple[float, ImageArray]]()
    with av.open(str(path)) as container:
        start = container.streams.video[0].start_time or 0
        for frame in container.decode(video=0):
            assert frame.pts is not None and frame.time_base is not None
            shown = float((frame.pts - start) * frame.time_base)
            frames.append((shown, np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)))
            if shown > max(times):
                break
    found = []
    for seconds in times:
        later = [one for one, following in pairwise(frames) if following[0] > seconds]
        found.append((later or frames[-1:])[0][1])
    return found


def measure(path: Path, options: Options, seed: int) -> dict[str, float]:
    """Return the seconds that each way takes. Exits if their frames differ."""
    length = video_seconds(path)
    times = [length * (index + 0.5) / options.frames for index in range(options.frames)]
    ways: dict[str, Callable[[], list[ImageArray]]] = {
        "decode": lambda: decode(path, times),
        "one_pass": lambda: _frames_at(path, times, ()),
        "seek": lambda: read_frames(path, times),
    }
    taken, found = {}, {}
    for name in np.random.default_rng(seed).permutation(list(ways)).tolist():
        began = time.perf_counter()
        found[name] = ways[name]()
        taken[name] = time.perf_counter() - began
    for name in ("one_pass", "seek"):
        if not all(np.array_equal(a, b) for a, b in zip(found["decode"], found[name], strict=True)):
            raise SystemExit(f"{path}: '{name}' and a full decode give different frames")
    return taken


def ratio(above: np.ndarray, below: np.ndarray) -> dict[str, Any]:
    """Geometric mean of above / below with its 95 % interval."""
    logs = np.log(above / below)
    half = student.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
    mean, low, high = np.exp([logs.mean(), logs.mean() - half, logs.mean() + half]).tolist()
    return {"ratio": mean, "interval_95": [low, high]}


def main(options: Options) -> None:
    """Print one JSON object."""
    with tempfile.TemporaryDirectory() as name:
        if options.folder is None:
            paths = [
                write_clip(Path(name) / f"{seed}.mp4", seed, options)
                for seed in track(range(options.clips), "encoding")
            ]
        else:
            found = sorted(path for path in options.folder.rglob("*") if path.suffix.lower() in VIDEOS)
            paths = found[: options.clips]
        if len(paths) < 2:
            raise SystemExit("an interval needs two clips or more")
        measure(paths[0], options, 0)  # loads the libraries
        rows = [measure(path, options, seed) for seed, path in enumerate(track(paths, "reading"))]
    seconds = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    result = {
        "decode_over_seek": ratio(seconds["decode"], seconds["seek"]),
        "decode_over_one_pass": ratio(seconds["decode"], seconds["one_pass"]),
        "ms_per_clip": {name: 1000 * float(values.mean()) for name, values in seconds.items()},
        "n": len(rows),
        "identical_frames": True,
        "options": {**asdict(options), "folder": str(options.folder or "")},
        "machine": this_machine().to_json() | {"load": os.getloadavg()[0]},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))
