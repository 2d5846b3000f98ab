"""Datasets of other programs with other episodes: some left out, several joined, all renumbered.

The result is a new LeRobotDataset of the same version. Videos are copied as they are: in v3.0 a file
keeps frames of episodes that are left out. Shape legend: E episodes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blm.datasets.dataset import EpisodeDataset
from blm.datasets.lerobot_columns import bare_mapping, features_of, is_vector, matrix
from blm.datasets.lerobot_foreign import load_foreign
from blm.datasets.lerobot_layouts import (
    V2_DATA,
    V2_VIDEOS,
    V3_DATA,
    V3_VIDEOS,
    Layout,
    data_files,
    read_layout,
)
from blm.datasets.lerobot_writer import text_index
from blm.datasets.statistics import compute_stats, histogram_stats, image_histogram
from blm.io import new_folder, read_json, read_json_lines, reading, write_json, write_text
from blm.types import BlmError

PICTURES_OF_STATISTICS = 64
"""Number of pictures per camera from which their statistics are computed."""
CHUNK = 1000
"""Episodes in a folder of v2, and files in a folder of v3."""


@dataclass(frozen=True)
class Selection:
    """Episodes of one dataset."""

    folder: Path
    episodes: tuple[int, ...] | None = None
    """Numbers from 0, ascending; None: all."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A dataset that episodes are taken from."""

    folder: Path
    info: Mapping[str, Any]
    layout: Layout
    kept: NDArray[np.int64]
    """[E] places of the kept episodes in the layout."""
    tasks: Mapping[int, int]
    """Number of an instruction here -> in the result."""
    first: int
    """Number of its first episode in the result."""

    @property
    def numbers(self) -> dict[int, int]:
        """Number of a kept episode here -> in the result."""
        return {self.layout.episodes[p]: self.first + i for i, p in enumerate(self.kept.tolist())}


@dataclass
class _Progress:
    """What was written so far."""

    frames: int = 0
    files: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One per episode, for meta/episodes."""


def select_episodes(selections: Sequence[Selection], out: Path) -> None:
    """Write a dataset of these episodes, in this order, to a new folder; atomically.

    Raises BlmError for datasets of this program, unlike versions, rates or features, episodes that
    do not exist, and an existing folder.
    """
    tasks = dict[str, int]()
    sources = list[_Source]()
    for one in selections:
        sources.append(_open(one, sum(len(source.kept) for source in sources), tasks))
    _require_alike(sources)
    version = sources[0].info["codebase_version"]
    with new_folder(out) as work:
        progress = _Progress()
        for source in sources:
            (_write_v3 if version == "v3.0" else _write_v2)(source, work, progress)
        _write_metadata(sources[0].info, tasks, work, progress)
        _copy_descriptions(sources, work)
        write_statistics(work)


def write_statistics(folder: Path) -> None:
    """Compute meta/stats.json of a dataset: exact for vectors, of some pictures for cameras."""
    info = read_json(folder / "meta/info.json")
    _require_foreign(folder, info)
    even = replace(bare_mapping(folder, info), clock="frame_index", instruction="")
    data = load_foreign(folder, info, even)
    features = features_of(folder, info)
    wanted = [name for name, one in features.items() if is_vector(one)]
    parts = dict[str, list[NDArray[Any]]]()
    for path in data_files(folder):
        with reading(path):
            table = pq.read_table(path, columns=[n for n in pq.read_schema(path).names if n in wanted])
            for name in table.column_names:
                parts.setdefault(name, []).append(matrix(table[name]))
    stats = {name: compute_stats(np.concatenate(part)) for name, part in parts.items()}
    for camera in data.cameras:
        stats[even.cameras[camera]] = histogram_stats(_histogram(data, camera))
    write_json(folder / "meta/stats.json", {k: {**s.to_json(), "count": [s.count]} for k, s in stats.items()})


def _histogram(data: EpisodeDataset, camera: str) -> NDArray[np.int64]:
    rows = np.unique(np.linspace(0, data.num_frames - 1, PICTURES_OF_STATISTICS).astype(np.int64))
    counts = [image_histogram(data.frames([row], camera)) for row in rows]
    return np.sum(counts, axis=0)


def _require_foreign(folder: Path, info: Mapping[str, Any]) -> None:
    if "blm" in info:
        raise BlmError(
            f"'{folder}' is a dataset of this program, which its manifest protects; `blm collect` makes "
            "others"
        )


def _open(one: Selection, first: int, tasks: dict[str, int]) -> _Source:
    """Read the layout of a dataset, and add its instructions to `tasks`."""
    info = read_json(one.folder / "meta/info.json")
    _require_foreign(one.folder, info)
    bare = bare_mapping(one.folder, info)
    features = features_of(one.folder, info)
    videos = tuple(key for key in bare.cameras.values() if features[key]["dtype"] == "video")
    layout = read_layout(one.folder, info, videos, bare.rate_hz, in_order=True)
    count = len(layout.lengths)
    kept = np.arange(count) if one.episodes is None else np.array(one.episodes, np.int64)
    if wrong := [i for i in kept.tolist() if not 0 <= i < count]:
        raise BlmError(f"'{one.folder}' has episodes 0..{count - 1}, not {', '.join(map(str, wrong[:8]))}")
    if not len(kept) or (np.diff(kept) <= 0).any():
        raise BlmError(f"'{one.folder}': name one or more episodes to keep, each once")
    own = {number: tasks.setdefault(text, len(tasks)) for number, text in sorted(layout.tasks.items())}
    return _Source(folder=one.folder, info=info, layout=layout, kept=kept, tasks=own, first=first)


def _require_alike(sources: Sequence[_Source]) -> None:
    def described(source: _Source) -> dict[str, Any]:
        features = features_of(source.folder, source.info)
        shapes = {name: (one["dtype"], tuple(one.get("shape") or ())) for name, one in features.items()}
        return {"version": source.info.get("codebase_version"), "fps": source.info.get("fps"), **shapes}

    first = described(sources[0])
    for source in sources[1:]:
        other = described(source)
        differ = sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
        if differ:
            shown = ", ".join(f"{name}: {first.get(name)} and {other.get(name)}" for name in differ[:4])
            raise BlmError(
                f"'{sources[0].folder}' and '{source.folder}' differ in {shown}; they cannot be joined"
            )


def _tables(source: _Source, progress: _Progress, paths: Sequence[Path]) -> Iterator[pa.Table]:
    """Yield the rows of kept episodes of each file that has any, renumbered."""
    for path in paths:
        with reading(path):
            table = pq.read_table(path)
            table = table.filter(pc.is_in(table["episode_index"], pa.array([*source.numbers])))
        if not len(table):
            continue
        episode = table["episode_index"].to_numpy()
        new = {"episode_index": np.array([source.numbers[i] for i in episode.tolist()])}
        new["index"] = progress.frames + np.arange(len(table))
        starts = np.flatnonzero(np.diff(episode, prepend=episode[0] - 1))
        new["frame_index"] = np.arange(len(table)) - np.repeat(starts, np.diff([*starts, len(table)]))
        for name in table.column_names:
            if name == "task_index" or (
                name.startswith("annotation.") and pa.types.is_integer(table[name].type)
            ):
                old = table[name].to_numpy()
                new[name] = np.array([source.tasks.get(i, i) for i in old.tolist()])
        for name, values in new.items():
            if name in table.column_names:
                column = table.column_names.index(name)
                table = table.set_column(column, table.field(name), pa.array(values, table[name].type))
        progress.frames += len(table)
        yield table


def _write_v3(source: _Source, work: Path, progress: _Progress) -> None:
    """Write data files, copy videos, and add the rows of the episodes."""
    rows = _rows_of_episodes(source)
    frames, files = progress.frames, progress.files
    for table in _tables(source, progress, source.layout.data):
        place = {"chunk_index": progress.files // CHUNK, "file_index": progress.files % CHUNK}
        path = work / V3_DATA.format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        for number in np.unique(table["episode_index"].to_numpy()).tolist():
            rows[number - source.first] |= {f"data/{name}": value for name, value in place.items()}
        progress.files += 1
    for key, (paths, file, _) in source.layout.videos.items():
        for number in np.unique(file[source.kept]).tolist():
            place = {"chunk_index": (files + number) // CHUNK, "file_index": (files + number) % CHUNK}
            target = work / V3_VIDEOS.format(video_key=key, **place)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(paths[number], target)
            for episode in np.flatnonzero(file[source.kept] == number).tolist():
                rows[episode] |= {f"videos/{key}/{name}": value for name, value in place.items()}
        progress.files = max(progress.files, files + len(paths))
    for row in rows:
        length = int(row["length"])
        row |= {"dataset_from_index": frames, "dataset_to_index": frames + length}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        frames += length
    progress.rows += rows


def _rows_of_episodes(source: _Source) -> list[dict[str, Any]]:
    """Return the row of each kept episode as the dataset has it, with its new number."""
    paths = sorted((source.folder / "meta/episodes").rglob("[!.]*.parquet"))
    with reading(source.folder / "meta/episodes"):
        if not paths:
            raise ValueError("it is missing")
        table = pa.concat_tables([pq.read_table(path) for path in paths], promote_options="default")
        found = {row["episode_index"]: row for row in table.to_pylist()}
    return [{**found[old], "episode_index": new} for old, new in source.numbers.items()]


def _write_v2(source: _Source, work: Path, progress: _Progress) -> None:
    """Write a data file and copy a video for each episode, and add their rows."""
    lines = source.folder / "meta/episodes.jsonl"
    found = {row["episode_index"]: row for row in read_json_lines(lines)} if lines.exists() else {}
    for place, (old, new) in zip(source.kept.tolist(), source.numbers.items(), strict=True):
        at = {"episode_chunk": new // CHUNK, "episode_index": new}
        (table,) = _tables(source, progress, [source.layout.data[place]])
        path = work / V2_DATA.format(**at)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        for key, (paths, file, _) in source.layout.videos.items():
            target = work / V2_VIDEOS.format(video_key=key, **at)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(paths[int(file[place])], target)
        progress.rows.append({**found.get(old, {}), "episode_index": new, "length": len(table)})


def _write_metadata(
    info: Mapping[str, Any], tasks: Mapping[str, int], work: Path, progress: _Progress
) -> None:
    """Write meta/ without the statistics."""
    count, meta = len(progress.rows), work / "meta"
    videos = len(list((work / "videos").rglob("*.mp4")))
    totals = {"episodes": count, "frames": progress.frames, "tasks": len(tasks), "videos": videos}
    newer = info["codebase_version"] == "v3.0"
    paths = {"data_path": V3_DATA if newer else V2_DATA, "video_path": V3_VIDEOS if newer else V2_VIDEOS}
    counts = {f"total_{name}": number for name, number in totals.items()}
    chunks = {"total_chunks": -(-count // CHUNK), "chunks_size": CHUNK, "splits": {"train": f"0:{count}"}}
    meta.mkdir(parents=True, exist_ok=True)
    write_json(meta / "info.json", {**info, **paths, **counts, **chunks})
    if newer:
        path = meta / "episodes/chunk-000/file-000.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(progress.rows), path)
        pq.write_table(text_index("task_index", [*tasks]), meta / "tasks.parquet")
        return
    _write_lines(meta / "episodes.jsonl", progress.rows)
    _write_lines(meta / "tasks.jsonl", [{"task_index": i, "task": text} for text, i in tasks.items()])


def _copy_descriptions(sources: Sequence[_Source], work: Path) -> None:
    """Copy GR00T's description of the first dataset, and the statistics of episodes (v2.1) if all
    datasets have them."""
    modality = sources[0].folder / "meta/modality.json"
    if modality.exists():
        shutil.copyfile(modality, work / "meta/modality.json")
    paths = [source.folder / "meta/episodes_stats.jsonl" for source in sources]
    if not all(path.exists() for path in paths):
        return
    rows = []
    for source, path in zip(sources, paths, strict=True):
        found = {row["episode_index"]: row for row in read_json_lines(path)}
        with reading(path):
            rows += [{**found[old], "episode_index": new} for old, new in source.numbers.items()]
    _write_lines(work / "meta/episodes_stats.jsonl", rows)


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def episodes_without(folder: Path, left_out: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers of a dataset's episodes, from 0, without some. Raises BlmError for unknown ones."""
    count = len(_open(Selection(folder), 0, {}).kept)
    if wrong := sorted(i for i in {*left_out} if not 0 <= i < count):
        raise BlmError(f"'{folder}' has episodes 0..{count - 1}, not {', '.join(map(str, wrong[:8]))}")
    return tuple(i for i in range(count) if i not in {*left_out})
