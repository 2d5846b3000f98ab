"""LeRobotDatasets as other programs write them."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from blm.datasets import video

FPS, LENGTHS = 10, (7, 5, 9, 6)

TEXTS = ("open the drawer", "close the drawer")

SHAPES = {"observation.images.top": (48, 64), "observation.image": (32, 32)}

NAMES = ["x.pos", "y.pos", "hand.pos"]

RNG = np.random.default_rng(0)

STATES, ACTIONS = (RNG.normal(size=(sum(LENGTHS), 3)).astype(np.float32) for _ in range(2))

STARTS = np.cumsum([0, *LENGTHS])


def picture(key, i):
    """Return frame i of one camera, whose grey level increases with i."""
    return np.full((*SHAPES[key], 3), 20 + 8 * i, np.uint8)


def features(**changes):
    vector = {"dtype": "float32", "shape": [3], "names": {"motors": NAMES}}
    scalar = {"dtype": "int64", "shape": [1], "names": None}
    numbers = dict.fromkeys(("timestamp", "frame_index", "episode_index", "index", "task_index"), scalar)
    videos = {
        key: {"dtype": "video", "shape": [*shape, 3], "names": ["height", "width", "channel"], "info": {}}
        for key, shape in SHAPES.items()
    }
    return {"observation.state": vector, "action": vector} | numbers | videos | changes


def rows(episode, lists=pa.list_):
    """Return the columns of one episode's frames."""
    n = LENGTHS[episode]
    place = slice(STARTS[episode], STARTS[episode + 1])
    kind = lists(pa.float32()) if lists is pa.list_ else pa.list_(pa.float32(), 3)
    return {
        "observation.state": pa.array(STATES[place].tolist(), kind),
        "action": pa.array(ACTIONS[place].tolist(), kind),
        "timestamp": pa.array(np.arange(n, dtype=np.float32) / np.float32(FPS)),
        "frame_index": pa.array(np.arange(n)),
        "episode_index": pa.array(np.full(n, episode)),
        "index": pa.array(np.arange(place.start, place.stop)),
        "task_index": pa.array(np.full(n, episode % 2)),
    }


def write_info(folder, changes, **info):
    info |= {"robot_type": "gantry", "fps": FPS, "chunks_size": 3, "features": features()}
    (folder / "meta").mkdir(parents=True, exist_ok=True)
    (folder / "meta/info.json").write_text(json.dumps(info | changes))


def write_v2(folder, version="v2.1", **changes):
    """Write one file per episode and three episodes per chunk."""
    name = "chunk-{episode_chunk:03d}/%s/episode_{episode_index:06d}"
    data, videos = f"data/{name.replace('/%s', '')}.parquet", f"videos/{name % '{video_key}'}.mp4"
    write_info(folder, changes, codebase_version=version, data_path=data, video_path=videos)
    for i, n in enumerate(LENGTHS):
        place = {"episode_chunk": i // 3, "episode_index": i}
        path = folder / data.format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(rows(i)), path)
        for key in SHAPES:
            path = folder / videos.format(video_key=key, **place)
            path.parent.mkdir(parents=True, exist_ok=True)
            video.encode(path, np.stack([picture(key, STARTS[i] + t) for t in range(n)]), FPS)
    lines = [{"episode_index": i, "tasks": [TEXTS[i % 2]], "length": n} for i, n in enumerate(LENGTHS)]
    (folder / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[::-1]))
    lines = [{"task_index": i, "task": text} for i, text in enumerate(TEXTS)]
    (folder / "meta/tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_v3(folder, **changes):
    """Write two data files, and two video files for one camera and one for the other, in two chunks."""
    name = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    data, videos = f"data/{name}.parquet", f"videos/{{video_key}}/{name}.mp4"
    write_info(folder, changes, codebase_version="v3.0", data_path=data, video_path=videos)
    files = {
        "data": [(0, 0, (0, 1)), (1, 0, (2, 3))],
        "videos/observation.images.top": [(0, 0, (0, 1, 2)), (0, 1, (3,))],
        "videos/observation.image": [(0, 0, (0, 1, 2, 3))],
    }
    table = [
        {
            "episode_index": i,
            "tasks": [TEXTS[i % 2]],
            "length": n,
            "dataset_from_index": int(STARTS[i]),
            "dataset_to_index": int(STARTS[i + 1]),
        }
        for i, n in enumerate(LENGTHS)
    ]
    for part, contents in files.items():
        for chunk, number, episodes in contents:
            key, place = part.removeprefix("videos/"), {"chunk_index": chunk, "file_index": number}
            path = folder / (data if part == "data" else videos).format(video_key=key, **place)
            path.parent.mkdir(parents=True, exist_ok=True)
            if part == "data":
                pq.write_table(pa.concat_tables(pa.table(rows(i, None)) for i in episodes), path)
            else:
                frames = [picture(key, k) for i in episodes for k in range(STARTS[i], STARTS[i + 1])]
                video.encode(path, np.stack(frames), FPS)
            for i in episodes:
                table[i] |= {f"{part}/chunk_index": chunk, f"{part}/file_index": number}
                if part != "data":
                    table[i][f"{part}/from_timestamp"] = (STARTS[i] - STARTS[episodes[0]]) / FPS
    for i in (0, 1):
        path = folder / f"meta/episodes/chunk-000/file-00{i}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(table[2 * i : 2 * i + 2]), path)
    index = {"task_index": pa.array([1, 0]), "__index_level_0__": pa.array(TEXTS[::-1])}
    pq.write_table(pa.table(index), folder / "meta/tasks.parquet")
    return folder
