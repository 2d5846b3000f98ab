"""Small LeRobotDatasets in the forms of public ones: names, sizes, units, codecs, layouts, omissions.

In all of them an arm goes a quarter of the way to a goal in each step.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

LENGTHS = (14, 11, 12)
DEGREES = 180 / np.pi


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a dataset is written."""

    version: str = "v2.1"
    fps: int = 10
    state: tuple[str, ...] | None = ("a", "b", "gripper")
    """Names of the state; None: there is no state."""
    action: tuple[str, ...] = ("a", "b", "gripper")
    state_key: str = "observation.state"
    action_key: str = "action"
    cameras: dict[str, tuple[int, int]] = field(default_factory=lambda: {"observation.images.top": (48, 64)})
    codec: str = "libx264"
    dtype: str = "video"
    names: Callable[[tuple[str, ...]], Any] = lambda names: {"motors": list(names)}
    units: Callable[[np.ndarray, bool], np.ndarray] = lambda values, is_action: values
    """Turns openings and rad [T, k] into the units of the dataset."""
    delta: bool = False
    jitter: float = 0.0
    """Error of time stamps, as a fraction of a step."""
    modality: dict[str, Any] | None = None
    extra: dict[str, Callable[[int], Any]] = field(default_factory=dict)
    """Column -> values of an episode of this length."""
    edit: Callable[[Path], None] = lambda folder: None
    """Damages or removes metadata at the end."""


def motion(form: Form, episode: int) -> tuple[np.ndarray, np.ndarray]:
    """Return states [T, S] and actions [T, D] of an episode, in the units of the dataset."""
    names = [*dict.fromkeys((*(form.state or ()), *form.action))]
    rng, length = np.random.default_rng(episode), LENGTHS[episode]
    values = np.zeros((length + 1, len(names)))
    values[0] = rng.uniform(0.1, 0.3, len(names))
    goal = values[0] + rng.choice([-1, 1], len(names)) * rng.uniform(0.8, 1.2, len(names))
    for place, name in enumerate(names):
        if "grip" in name:
            goal[place] = 1.0 if episode % 2 else 0.0
    for t in range(length):
        values[t + 1] = values[t] + 0.25 * (goal - values[t])
    state = values[:-1, [names.index(n) for n in form.state or ()]]
    action = values[1:, [names.index(n) for n in form.action]]
    if form.delta:
        grips = np.array(["grip" in n for n in form.action])
        before = values[:-1, [names.index(n) for n in form.action]]
        action = np.where(grips, action, action - before)
    return form.units(state, False), form.units(action, True)


def pictures(form: Form, camera: str, episode: int) -> np.ndarray:
    """Return [T, H, W, 3]: a bright square that moves over a dark picture."""
    height, width = form.cameras[camera]
    frames = np.full((LENGTHS[episode], height, width, 3), 30, np.uint8)
    for t in range(LENGTHS[episode]):
        frames[t, 8:20, 2 * t : 2 * t + 12] = (230, 120, 10)
    return frames


def encode(path: Path, frames: np.ndarray, form: Form) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        options = {"preset": "12"} if form.codec == "libsvtav1" else {}
        stream = container.add_stream(form.codec, rate=form.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


def vector(values: np.ndarray, names: tuple[str, ...], form: Form) -> dict[str, Any]:
    return {"dtype": "float32", "shape": [values.shape[1]], "names": form.names(names)}


def write_form(folder: Path, form: Form) -> Path:
    """Write the dataset of a form."""
    features: dict[str, Any] = {}
    state, action = motion(form, 0)
    if form.state is not None:
        features[form.state_key] = vector(state, form.state, form)
    features[form.action_key] = vector(action, form.action, form)
    for camera, (height, width) in form.cameras.items():
        features[camera] = {"dtype": form.dtype, "shape": [height, width, 3], "names": None}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "int64", "shape": [1], "names": None}
    for name, make in form.extra.items():
        kind = "string" if isinstance(make(1)[0], str) else "int64"
        features[name] = {"dtype": kind, "shape": [1], "names": None}
    tables = [_rows(form, i) for i in range(len(LENGTHS))]
    info = {"codebase_version": form.version, "robot_type": "toy", "fps": form.fps, "features": features}
    (folder / "meta").mkdir(parents=True)
    (_write_v3 if form.version == "v3.0" else _write_v2)(folder, form, tables, info)
    (folder / "meta/info.json").write_text(json.dumps(info))
    if form.modality is not None:
        (folder / "meta/modality.json").write_text(json.dumps(form.modality))
    form.edit(folder)
    return folder


def _rows(form: Form, episode: int) -> pa.Table:
    state, action = motion(form, episode)
    n, rng = LENGTHS[episode], np.random.default_rng(episode)
    stamps = (np.arange(n) + rng.uniform(-form.jitter, form.jitter, n)) / form.fps
    columns: dict[str, Any] = {}
    if form.state is not None:
        columns[form.state_key] = state.astype(np.float32).tolist()
    columns |= {
        form.action_key: action.astype(np.float32).tolist(),
        "timestamp": stamps.astype(np.float32),
        "frame_index": np.arange(n),
        "episode_index": np.full(n, episode),
        "index": np.arange(n) + sum(LENGTHS[:episode]),
        "task_index": np.zeros(n, np.int64),
    }
    for camera in form.cameras if form.dtype == "image" else ():
        columns[camera] = [{"bytes": png(one), "path": None} for one in pictures(form, camera, episode)]
    columns |= {name: make(n) for name, make in form.extra.items()}
    return pa.table(columns)


def png(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()


def _write_v2(folder: Path, form: Form, tables: list[pa.Table], info: dict[str, Any]) -> None:
    info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    for i, table in enumerate(tables):
        path = folder / info["data_path"].format(episode_chunk=0, episode_index=i)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        for camera in form.cameras if form.dtype == "video" else ():
            place = info["video_path"].format(episode_chunk=0, episode_index=i, video_key=camera)
            encode(folder / place, pictures(form, camera, i), form)
    lines = [{"episode_index": i, "tasks": ["pick it up"], "length": n} for i, n in enumerate(LENGTHS)]
    (folder / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "pick it up"}) + "\n")


def _write_v3(folder: Path, form: Form, tables: list[pa.Table], info: dict[str, Any]) -> None:
    """Write one data file, and the videos of the last episode apart."""
    info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    path = folder / info["data_path"].format(chunk_index=0, file_index=0)
    path.parent.mkdir(parents=True)
    pq.write_table(pa.concat_tables(tables), path)
    rows = []
    for i, n in enumerate(LENGTHS):
        first = sum(LENGTHS[:i])
        row: dict[str, Any] = {"episode_index": i, "tasks": ["pick it up"], "length": n}
        row |= {"dataset_from_index": first, "dataset_to_index": first + n}
        row |= {"data/chunk_index": 0, "data/file_index": 0}
        for camera in form.cameras if form.dtype == "video" else ():
            row |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": int(i == 2)}
            row[f"videos/{camera}/from_timestamp"] = (first if i < 2 else 0) / form.fps
        rows.append(row)
    for camera in form.cameras if form.dtype == "video" else ():
        for number, episodes in enumerate(((0, 1), (2,))):
            place = info["video_path"].format(video_key=camera, chunk_index=0, file_index=number)
            frames = np.concatenate([pictures(form, camera, i) for i in episodes])
            encode(folder / place, frames, form)
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    tasks = pa.table({"task_index": [0], "__index_level_0__": ["pick it up"]})
    pq.write_table(tasks, folder / "meta/tasks.parquet")


def in_degrees(values: np.ndarray, is_action: bool) -> np.ndarray:
    """Return joints in degrees, and a gripper of 0..100 in the last place."""
    return np.concatenate([values[:, :-1] * DEGREES, values[:, -1:] * 100], axis=1)


def in_ticks(values: np.ndarray, is_action: bool) -> np.ndarray:
    return np.round(2048 + values * 4096 / (2 * np.pi))


def edited_info(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Return an edit of meta/info.json."""

    def edit(folder: Path) -> None:
        info = json.loads((folder / "meta/info.json").read_text())
        change(info)
        (folder / "meta/info.json").write_text(json.dumps(info))

    return edit


def without(*names: str) -> Callable[[Path], None]:
    """Return an edit that empties or removes metadata files."""

    def edit(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return edit


ARM7 = tuple(f"joint_{i}" for i in range(7))
BIMANUAL = tuple(f"{side}_{part}" for side in ("left", "right") for part in ("waist", "elbow", "gripper"))
POSE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
GROUPS = {
    "state": {"single_arm": {"start": 0, "end": 2}, "gripper": {"start": 2, "end": 3}},
    "action": {"single_arm": {"start": 0, "end": 2}, "gripper": {"start": 2, "end": 3}},
    "video": {"top": {"original_key": "observation.images.top"}},
    "annotation": {"human.action.task_description": {}},
}

FORMS: dict[str, Form] = {
    "wide pictures, v2.0, MPEG-4": Form(version="v2.0", codec="mpeg4"),
    "AV1, several episodes in a file, v3.0": Form(version="v3.0", codec="libsvtav1"),
    "two cameras of unlike size": Form(
        cameras={"observation.images.front": (48, 64), "observation.images.wrist": (64, 48)}
    ),
    "state longer than the action": Form(state=("a", "b", "c", "gripper"), action=("a", "b", "gripper")),
    "eight states, seven actions": Form(
        state=(*ARM7, "gripper"), action=(*ARM7[:6], "gripper"), names=lambda names: list(names)
    ),
    "openpi": Form(
        state_key="state",
        action_key="actions",
        cameras={"image": (64, 64), "wrist_image": (64, 64)},
        dtype="image",
        names=lambda names: ["state"],
    ),
    "GR00T": Form(
        version="v2.0",
        names=lambda names: None,
        modality=GROUPS,
        extra={"annotation.human.action.task_description": lambda n: np.zeros(n, np.int64)},
    ),
    "pictures in the data files, v3.0": Form(version="v3.0", dtype="image"),
    "bimanual": Form(state=BIMANUAL, action=BIMANUAL),
    "degrees": Form(
        units=in_degrees,
        state=("shoulder_pan.pos", "elbow.pos", "gripper.pos"),
        action=("shoulder_pan.pos", "elbow.pos", "gripper.pos"),
    ),
    "servo ticks": Form(units=in_ticks, version="v3.0"),
    "deltas of joints": Form(delta=True),
    "steps of the end effector": Form(state=POSE, action=POSE, delta=True, names=lambda names: list(names)),
    "clock jitter": Form(jitter=0.4),
    "clock jitter, v3.0": Form(jitter=0.4, version="v3.0"),
    "names in nested lists": Form(names=lambda names: [list(names)]),
    "names in groups": Form(names=lambda names: {"arm": list(names[:-1]), "hand": list(names[-1:])}),
    "no metadata of episodes, v2.1": Form(edit=without("meta/episodes.jsonl")),
    "no metadata of episodes, v3.0": Form(
        version="v3.0", edit=without("meta/episodes/chunk-000/file-000.parquet")
    ),
    "no rate, no paths": Form(
        edit=edited_info(lambda info: [info.pop(k) for k in ("fps", "data_path", "video_path")])
    ),
    "no description of features": Form(
        version="v3.0", dtype="image", edit=edited_info(lambda info: info.update(features={}))
    ),
    "no instructions": Form(edit=without("meta/tasks.jsonl", "meta/episodes.jsonl")),
    "no state": Form(state=None, action=("delta_x", "delta_y", "gripper"), delta=True),
}
