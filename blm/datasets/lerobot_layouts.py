"""Where the format versions of LeRobotDataset keep episodes, data files, videos and instructions.

Metadata that are missing are computed from the data files where they can be; what cannot be computed
is a BlmError. Shape legend: N frames, E episodes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blm.datasets.dataset import IndexArray
from blm.datasets.video import count_frames
from blm.io import DamagedError, read_json_lines, reading
from blm.types import BlmError

REWRITE = "fix it with the program that wrote it"
V2_CHUNKS = 1000
"""Default number of episodes in a folder of v2."""
V2_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
V2_VIDEOS = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
V3_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
V3_VIDEOS = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
Videos = tuple[tuple[Path, ...], IndexArray, IndexArray]
"""Video files, index of the file of each episode [E], and its first frame there [E]."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parts of a dataset that differ between the format versions."""

    episodes: tuple[int, ...]
    """[E] numbers of the episodes in the data files, ascending; gaps are allowed."""
    lengths: IndexArray
    """[E] number of frames of each episode."""
    data: tuple[Path, ...]
    """Parquet files, in the order of their frames."""
    videos: Mapping[str, Videos]
    """Feature -> its videos."""
    tasks: Mapping[int, str]
    """Number of an instruction -> its text; empty if the dataset does not state any."""
    episode_tasks: tuple[str, ...]
    """[E] first instruction of each episode, or empty if episodes do not state any."""

    @property
    def starts(self) -> IndexArray:
        """[E + 1] first frame of each episode, and the number of frames."""
        return np.concatenate([[0], np.cumsum(self.lengths)])


def read_layout(
    folder: Path, info: Mapping[str, Any], videos: Sequence[str], rate_hz: float, in_order: bool
) -> Layout:
    """Return the layout of a dataset; `videos` are the features that are needed.

    With `in_order`, the episodes of a video follow one another without gaps, whatever their time
    stamps say. Raises BlmError for an unknown version and for metadata that are damaged.
    """
    version = str(info.get("codebase_version"))
    if version not in _LAYOUTS:
        raise BlmError(
            f"'{folder}' is a LeRobotDataset {version}; this program reads {', '.join(_LAYOUTS)}: convert it "
            "with LeRobot's own converter"
        )
    layout = _LAYOUTS[version](folder, info, videos, rate_hz, in_order)
    if not len(layout.lengths) or layout.lengths.min() < 1:
        raise DamagedError(f"'{folder}' has no episode, or an empty one", REWRITE)
    return layout


def data_files(folder: Path) -> list[Path]:
    """Return all data files of a dataset, in the order of their frames."""
    return sorted((folder / "data").rglob("[!.]*.parquet"))


def _layout_v3(
    folder: Path, info: Mapping[str, Any], videos: Sequence[str], rate_hz: float, in_order: bool
) -> Layout:
    tables = []
    for path in sorted((folder / "meta/episodes").rglob("[!.]*.parquet")):
        with reading(path):
            names = [name for name in pq.read_schema(path).names if not name.startswith("stats/")]
            tables.append(pq.read_table(path, columns=names))
    if not sum(len(table) for table in tables):
        return _computed_v3(folder, videos)
    with reading(folder / "meta/episodes"):
        table = pa.concat_tables(tables, promote_options="default").sort_by("episode_index")
        rows = {name: table[name].to_numpy() for name in table.column_names if name != "tasks"}
        lengths = rows["length"].astype(np.int64)
        first = np.cumsum(lengths) - lengths
        if not np.array_equal(rows.get("dataset_from_index", first), first):
            raise DamagedError(f"'{folder}/meta/episodes': episodes do not follow one another", REWRITE)

        def files(place: str, template: str, **key: str) -> tuple[tuple[Path, ...], IndexArray]:
            pairs = np.stack([rows[f"{place}/chunk_index"], rows[f"{place}/file_index"]], axis=1)
            unique, number = np.unique(pairs, axis=0, return_inverse=True)
            paths = [_path(folder, template, chunk_index=int(c), file_index=int(f), **key) for c, f in unique]
            return tuple(paths), number.ravel()

        camera_videos: dict[str, Videos] = {}
        for key in videos:
            place = f"videos/{key}"
            paths, file = files(place, info.get("video_path", V3_VIDEOS), video_key=key)
            begins = rows[f"{place}/from_timestamp"] * rate_hz
            if in_order:
                begins = _begins_in_order(file, lengths)
            elif np.abs(begins - np.round(begins)).max() > 0.1:
                raise DamagedError(
                    f"'{folder}': episodes start between two frames of {key}",
                    'if they follow one another, state "clock": "frame_index" in a mapping '
                    f"(blm doctor {folder} --suggest)",
                )
            camera_videos[key] = paths, file, np.round(begins).astype(np.int64)
        return Layout(
            episodes=tuple(rows["episode_index"].tolist()),
            lengths=lengths,
            data=files("data", info.get("data_path", V3_DATA))[0],
            videos=camera_videos,
            tasks=_tasks(folder),
            episode_tasks=_first_texts(table["tasks"].to_pylist() if "tasks" in table.column_names else []),
        )


def _begins_in_order(file: IndexArray, lengths: IndexArray) -> NDArray[np.float64]:
    """Return the first frame of each episode in its file, if a file holds them without gaps."""
    begins = np.zeros(len(lengths))
    for number in np.unique(file):
        mine = file == number
        begins[mine] = np.cumsum(lengths[mine]) - lengths[mine]
    return begins


def _computed_v3(folder: Path, videos: Sequence[str]) -> Layout:
    """Return the layout of a v3 dataset without meta/episodes, from its data files and videos."""
    data = data_files(folder)
    numbers: list[NDArray[Any]] = []
    for path in data:
        with reading(path):
            numbers.append(pq.read_table(path, columns=["episode_index"])["episode_index"].to_numpy())
    column = np.concatenate(numbers) if numbers else np.zeros(0, np.int64)
    episodes, lengths = np.unique(column, return_counts=True)
    if (np.diff(column) < 0).any():
        raise DamagedError(f"'{folder}' lacks meta/episodes, and its frames are not in order", REWRITE)
    return Layout(
        episodes=tuple(episodes.tolist()),
        lengths=lengths,
        data=tuple(data),
        videos={key: _videos_in_order(folder, key, lengths) for key in videos},
        tasks=_tasks(folder),
        episode_tasks=(),
    )


def _videos_in_order(folder: Path, key: str, lengths: IndexArray) -> Videos:
    """Return the places of episodes that fill the videos of a camera one after another."""
    paths = tuple(sorted((folder / "videos" / key).rglob("[!.]*.mp4")))
    ends = np.cumsum([count_frames(path) for path in paths])
    last = np.cumsum(lengths)
    if not len(paths) or ends[-1] != last[-1] or not np.isin(ends, last).all():
        raise DamagedError(
            f"'{folder}' lacks meta/episodes, and the videos of {key} do not end with its episodes", REWRITE
        )
    file = np.searchsorted(ends, last)
    return paths, file, last - lengths - np.concatenate([[0], ends])[file]


def _layout_v2(
    folder: Path, info: Mapping[str, Any], videos: Sequence[str], rate_hz: float, in_order: bool
) -> Layout:
    path = folder / "meta/episodes.jsonl"
    lengths, texts = dict[int, int](), dict[int, Any]()
    if path.exists():
        with reading(path):
            for row in read_json_lines(path):
                lengths[int(row["episode_index"])] = int(row["length"])
                texts[int(row["episode_index"])] = row.get("tasks")
    if not lengths:
        lengths = _lengths_of_files(folder)
    numbers = np.array(sorted(lengths), np.int64)
    chunk = info.get("chunks_size") or V2_CHUNKS

    def files(template: str, **key: str) -> tuple[Path, ...]:
        return tuple(
            _path(folder, template, episode_chunk=i // chunk, episode_index=i, **key)
            for i in numbers.tolist()
        )

    place = np.arange(len(numbers))
    video_path = info.get("video_path") or V2_VIDEOS
    return Layout(
        episodes=tuple(numbers.tolist()),
        lengths=np.array([lengths[i] for i in numbers.tolist()], np.int64),
        data=files(info.get("data_path", V2_DATA)),
        videos={key: (files(video_path, video_key=key), place, np.zeros_like(place)) for key in videos},
        tasks=_tasks(folder),
        episode_tasks=_first_texts([texts.get(i) for i in numbers.tolist()]),
    )


def _lengths_of_files(folder: Path) -> dict[int, int]:
    """Return episode -> number of frames, from the data files of v2."""
    lengths = dict[int, int]()
    for path in data_files(folder):
        if match := re.fullmatch(r"episode_(\d+)", path.stem):
            with reading(path):
                lengths[int(match[1])] = pq.ParquetFile(path).metadata.num_rows
    return lengths


_LAYOUTS: Mapping[str, Callable[[Path, Mapping[str, Any], Sequence[str], float, bool], Layout]] = {
    "v3.0": _layout_v3,
    "v2.1": _layout_v2,
    "v2.0": _layout_v2,
}


def _tasks(folder: Path) -> dict[int, str]:
    """Return number -> text of the instructions; {} if the dataset does not state any."""
    table, lines = folder / "meta/tasks.parquet", folder / "meta/tasks.jsonl"
    if table.exists():
        with reading(table):
            tasks = pq.read_table(table)
            columns = tasks.column_names
            (text,) = [n for n in ("task", "__index_level_0__") if n in columns][:1] or [
                n for n in columns if n != "task_index"
            ]
            return dict(zip(tasks["task_index"].to_pylist(), map(str, tasks[text].to_pylist()), strict=True))
    if lines.exists():
        with reading(lines):
            return {int(row["task_index"]): str(row["task"]) for row in read_json_lines(lines)}
    return {}


def _first_texts(lists: Sequence[Any]) -> tuple[str, ...]:
    """Return the first text of each episode, or () unless every episode has one."""
    texts = [one[0] if isinstance(one, list) and one else one for one in lists]
    return tuple(texts) if texts and all(isinstance(text, str) for text in texts) else ()


def _path(folder: Path, template: str, **place: Any) -> Path:
    if not isinstance(template, str):
        raise DamagedError(f"'{folder}/meta/info.json' cannot be read: a path of its files is {template!r}")
    try:
        name = PurePosixPath(template.format(**place))
    except (KeyError, IndexError, ValueError) as error:
        raise DamagedError(
            f"'{folder}/meta/info.json' has the path '{template}', which cannot be filled in: {error}",
            REWRITE,
        ) from error
    if name.is_absolute() or ".." in name.parts:
        raise BlmError(f"'{folder}/meta/info.json' names the file '{name}', outside of the dataset")
    return folder / name
