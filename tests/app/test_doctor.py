"""`blm doctor` on datasets: every fault is named, with its fix, also when there are several at once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blm.app.doctor import examine_path
from blm.datasets import video
from blm.datasets.files import MANIFEST, write_manifest
from blm.datasets.lerobot import finalize_dataset, open_dataset, stage_episode
from blm.io import sha256_file
from blm.robots import ROBOTS
from blm.types import BlmError
from tests.support.episodes import EPISODES, SIDE, SPACE, numbered_frames, write
from tests.support.foreign_datasets import write_v2, write_v3


def faults(folder):
    """What is found wrong; each line must come with a fix."""
    return [check.found for check in examine_path(folder) if check.fix]


def found(folder, *reasons):
    """Whether exactly these things are found wrong, in any order."""
    said = faults(folder)
    assert len(said) == len(reasons), said
    return all(any(reason in line for line in said) for reason in reasons)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "out", EPISODES)


def sign_again(folder):
    """Write the manifest anew, as a program that made the fault would have done."""
    (folder / MANIFEST).unlink()
    write_manifest(folder, 2, {})


def edit(folder, **columns):
    """Change columns of the data file."""
    path = folder / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    for name, change in columns.items():
        values = change(np.array(table[name].to_pylist()))
        kind = table.schema.field(name).type
        table = table.set_column(table.column_names.index(name), name, pa.array(values.tolist(), kind))
    pq.write_table(table, path)
    sign_again(folder)


def at(place, value):
    def change(values):
        values[place] = value
        return values

    return change


def test_good_datasets_report_their_content(folder, tmp_path):
    (check,) = examine_path(folder)
    assert check.fix == "" and "arm: 3 episodes, 28 frames, 2 cameras; all files match the" in check.found
    for writer in (write_v2, write_v3):
        (check,) = examine_path(writer(tmp_path / writer.__name__))
        assert check.fix == "" and "gantry: 4 episodes, 27 frames, 2 cameras; no manifest" in check.found


def test_all_faults_of_vectors_are_listed_at_once(folder):
    edit(
        folder,
        **{
            "observation.state": at(([2, 20, 21], 1), np.nan),
            "executed_action": at((5, 0), np.inf),
            "action": at((3, 2), 9.0),
            "timestamp": at([10], 0.4),
        },
    )
    assert found(
        folder,
        "observation.state is not finite in 3 frames, in episodes 0, 2",
        "executed_action is not finite in 1 frames, in episodes 0",
        "stats.json does not belong to these frames: max, mean, std",
        "timestamps are not those of 20 Hz in 1 frames, in episodes 1",
    )


def test_joints_that_never_move_and_foreign_units_are_named(folder):
    def degrees(values):
        values[:, 0] = 57.3 * values[:, 0] + 100
        return values

    edit(folder, **{"action": lambda values: values * [1, 0, 1], "observation.state": degrees})
    statistics = "stats.json does not belong to these frames"
    assert found(folder, "are these degrees", "has the same target in all frames", statistics, statistics)


def test_statistics_are_compared_in_full(folder):
    path = folder / "meta/stats.json"
    stats = json.loads(path.read_text())
    stats["action"]["q99"][0] += 0.01
    path.write_text(json.dumps(stats))
    sign_again(folder)
    assert found(folder, "stats.json does not belong to these frames: q99 of action")


def test_frames_in_a_wrong_order_are_found(folder):
    edit(folder, episode_index=at([8], 0))
    assert found(folder, "frames are not in the order of")


def test_all_damaged_files_are_named(folder):
    base, wrist = sorted(folder.glob("videos/*/*/*.mp4"))
    base.write_bytes(base.read_bytes()[:-500])
    wrist.unlink()
    assert found(
        folder,
        f"'{base}' has",
        f"'{wrist}' is missing",
        f"video '{base}' cannot be read",
        f"video '{wrist}' is missing",
    )
    data = folder / "data/chunk-000/file-000.parquet"
    data.write_bytes(data.read_bytes()[:100])
    (folder / "meta/stats.json").write_text("{}")
    assert found(
        folder, f"'{base}'", f"'{wrist}'", f"'{data}' has 100 bytes", "stats.json' has 2 bytes", "cannot be"
    )


def test_videos_of_another_length_or_rate_are_found(folder):
    base, wrist = sorted(folder.glob("videos/*/*/*.mp4"))
    video.encode(base, numbered_frames([1, 2]), 20)
    video.encode(wrist, numbered_frames(range(28)), 30)
    sign_again(folder)
    assert found(
        folder, "base/chunk-000/file-000.mp4' has 2 frames, its episodes need 28", "has 30 frames per second"
    )


def test_a_lost_or_broken_manifest_is_a_fault(folder):
    (folder / MANIFEST).write_text("{")
    assert found(folder, "manifest.json' cannot be read")
    (folder / MANIFEST).unlink()
    assert found(folder, "manifest.json' is missing")


def test_without_a_manifest_every_file_is_read_to_its_end(tmp_path):
    write_v2(tmp_path)
    cut = next(tmp_path.glob("videos/chunk-001/*top/*.mp4"))
    video.encode(cut, np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3)).astype(np.uint8), 10)
    content = bytearray(cut.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 300] = b"\xaa" * 300
    cut.write_bytes(content)
    empty = [tmp_path / f"data/chunk-000/episode_00000{i}.parquet" for i in (0, 2)]
    for path in empty:
        path.write_bytes(b"")
    said = "\n".join(faults(tmp_path))
    assert f"video '{cut}': only" in said and all(f"'{path}' cannot be read" in said for path in empty), said


def test_an_action_space_that_this_version_does_not_have(tmp_path):
    panda = ROBOTS["panda"].action_space
    other = dataclasses.replace(SPACE, robot="panda")
    episodes = [dataclasses.replace(episode, robot="panda") for episode in EPISODES]
    staged = [stage_episode(tmp_path / "staging", f"{e.task}/{e.seed}", e) for e in episodes]
    layout = {"cameras": ("base",), "image_size": SIDE, "provenance": {}}
    folder = finalize_dataset(staged, tmp_path / "panda", space=other, **layout)
    (line,) = faults(folder)
    assert "action spaces of 'panda' differ" in line and str(panda.names) in line and str(SPACE.names) in line


def test_a_collection_is_examined_robot_by_robot(folder, tmp_path):
    out = tmp_path / "out"
    assert not faults(out)
    (out / "collect.json").write_text(json.dumps({"robots": ["arm", "panda"]}))
    (out / "summary.json").write_text("{}")
    next(folder.glob("videos/*/*/*.mp4")).unlink()
    lines = list(examine_path(out))
    assert {check.name for check in lines} == {str(out / "arm"), str(out / "panda")}
    assert any(check.found == "dataset: missing" for check in lines)
    assert sum("is missing" in check.found for check in lines) == 2


def test_an_unfinished_collection_comes_with_a_remedy(tmp_path):
    out = tmp_path / "out"
    stage_episode(out / ".staging", "arm/push/1", EPISODES[0])
    stage_episode(out / ".staging", "arm/push/2", EPISODES[1])
    (out / "collect.json").write_text(json.dumps({"robots": ["arm"]}))
    unfinished, missing = examine_path(out)
    assert unfinished.found == "unfinished collection with 2 finished episodes"
    assert missing.found == "dataset: missing"
    assert all("run the same collect command again" in check.fix for check in (unfinished, missing))


def test_leftovers_of_a_stopped_writing_are_named(folder):
    left = folder.parent / ".arm.00000000-999999-1-1.part"
    left.mkdir()
    os.utime(left, (0, 0))  # of another machine, long ago
    assert found(folder, f"{left.name}' is left over")


def reencode(path, change, rate=20):
    """Write a video anew, with its frames changed."""
    frames = [video.VideoFile(path).read(i) for i in range(video.count_frames(path))]
    video.encode(path, np.stack(change(frames)), rate)


@pytest.mark.parametrize("place", [0, 10, 27])
def test_extra_frames_are_a_misalignment_also_in_foreign_datasets(folder, tmp_path, place):
    base = next(folder.glob("videos/*base/*/*.mp4"))
    reencode(base, lambda frames: [*frames[:place], frames[place], *frames[place:]])
    sign_again(folder)
    assert found(folder, "has 29 frames, its episodes need 28: 1 too many, so images and rows")
    write_v2(tmp_path / "foreign")
    top = next((tmp_path / "foreign").glob("videos/chunk-001/*top/*.mp4"))
    reencode(top, lambda frames: [*frames, frames[-1]], 10)
    assert any("1 too many" in line for line in faults(tmp_path / "foreign"))


def test_videos_shown_at_other_times_are_found(folder):
    base = next(folder.glob("videos/*base/*/*.mp4"))
    shifted = base.with_name("shifted.mp4")
    with av.open(str(base)) as source, av.open(str(shifted), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.pts is not None:
                tick = round(1 / (stream.average_rate * stream.time_base))
                late = 3 * tick // 10 if packet.pts >= 10 * tick else 0
                packet.pts, packet.dts, packet.stream = packet.pts + late, packet.dts + late, copy
                target.mux(packet)
    shifted.replace(base)
    sign_again(folder)
    assert found(folder, "shows 18 frames at other times than")


def test_a_frozen_camera_is_found_where_the_arm_moves(folder):
    base = next(folder.glob("videos/*base/*/*.mp4"))
    data = open_dataset(folder)
    first, stop = data.starts[1:3]
    reencode(base, lambda frames: [*frames[:first], *[frames[first]] * (stop - first), *frames[stop:]])
    sign_again(folder)
    assert found(folder, "camera 'base' shows the same image throughout episodes in which the arm moves")


def test_a_still_arm_before_a_still_camera_is_no_fault(folder):
    base = next(folder.glob("videos/*base/*/*.mp4"))
    data = open_dataset(folder)
    first, stop = data.starts[1:3]
    reencode(base, lambda frames: [*frames[:first], *[frames[first]] * (stop - first), *frames[stop:]])

    def still(values):
        values[first:stop] = values[first]
        return values

    edit(folder, **{"observation.state": still})
    assert found(folder, "stats.json does not belong to these frames")


@pytest.mark.parametrize(
    ("name", "shape"), [("action", [4]), ("observation.images.base", [8, 8, 3]), ("extra", [1])]
)
def test_shapes_that_are_not_those_of_the_data_are_named(folder, name, shape):
    path = folder / "meta/info.json"
    info = json.loads(path.read_text())
    info["features"].setdefault(name, {"dtype": "float32", "names": None})["shape"] = shape
    path.write_text(json.dumps(info))
    sign_again(folder)
    assert found(folder, f"declares {name}")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "a" + "\nsize 12345\n"


@pytest.mark.parametrize(
    "pattern", ["data/**/*.parquet", "videos/**/*.mp4", "meta/**/*.parquet", "meta/stats.json"]
)
@pytest.mark.parametrize("own", [True, False])
def test_git_lfs_pointers_are_named_as_such(folder, tmp_path, pattern, own):
    if not own:
        folder = write_v3(tmp_path / "foreign")
    pointed = sorted(folder.glob(pattern))
    for path in pointed:
        path.write_text(POINTER)
    lines = [check for check in examine_path(folder) if check.fix]
    assert [line.found for line in lines] == [
        f"dataset: '{p}' is a Git LFS pointer, not the file itself" for p in pointed
    ]
    assert all("git lfs pull" in line.fix for line in lines) and (lines or not own)
    if pointed and (own or pattern != "meta/stats.json"):
        with pytest.raises(BlmError, match=r"Git LFS pointer.*git lfs pull"):
            open_dataset(folder)


def test_pointers_in_a_checkpoint_are_named(tmp_path):
    (tmp_path / "policy.safetensors").write_text(POINTER)
    (tmp_path / "config.json").write_text("{}")
    hashes = {"config.json": sha256_file(tmp_path / "config.json"), "policy.safetensors": "0"}
    (tmp_path / "manifest.json").write_text(json.dumps(hashes))
    (check,) = examine_path(tmp_path)
    assert "Git LFS pointer" in check.found and "git lfs pull" in check.fix


def test_no_fix_advises_to_delete(folder, tmp_path):
    """Whatever is broken, nobody is told to remove data."""
    rng, said = np.random.default_rng(1), []
    for place in (folder, write_v2(tmp_path / "v2"), write_v3(tmp_path / "v3")):
        for path in [path for path in place.rglob("*") if path.is_file()]:
            whole = path.read_bytes()
            for content in (b"", b"{}", whole[: len(whole) // 2], rng.bytes(64)):
                path.write_bytes(content)
                said += [f"{check.found} {check.fix}" for check in examine_path(place) if check.fix]
            path.write_bytes(whole)
    assert len(said) > 50
    assert not [line for line in said if re.search(r"\b(delete|remove|rm)\b", line)], said


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "null", '{"codebase_version": "v3.0"}', '{"blm": 3}', "\0"]
)
def test_any_folder_can_be_examined(tmp_path, content):
    (tmp_path / "d/meta").mkdir(parents=True)
    (tmp_path / "d/meta/info.json").write_text(content)
    (tmp_path / "c").mkdir()
    for name in ("manifest.json", "config.json", "collect.json"):
        (tmp_path / "c" / name).write_text(content)
    (tmp_path / "e/meta/info.json").mkdir(parents=True)
    for place in ("d", "c", "e", "d/meta/info.json", "nothing"):
        checks = list(examine_path(tmp_path / place))
        assert checks and any(check.fix for check in checks), place
    assert (tmp_path / "d/meta/info.json").read_text() == content


def test_progress_is_shown_on_large_sets(folder, capsys, monkeypatch):
    monkeypatch.setattr("blm.app.doctor.PROGRESS_FROM", 1)
    seen = []
    monkeypatch.setattr("blm.app.doctor.track", lambda things, title, **_: seen.append(title) or things)
    assert not faults(folder)
    assert seen == ["checking files", "checking pictures"]


def test_other_folders_are_refused_with_what_is_expected(tmp_path):
    (check,) = examine_path(tmp_path)
    assert check.found == "neither a dataset nor a checkpoint" and "meta/info.json" in check.fix
    (check,) = examine_path(tmp_path / "nothing")
    assert check.found == "no such folder"


def test_any_changed_byte_is_found(folder):
    """Damages one file at a time at random; nothing but a clear error may come of it."""
    rng = np.random.default_rng(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    for trial in range(40):
        path = files[rng.integers(len(files))]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        place = int(rng.integers(len(damaged)))
        if trial % 2:
            damaged = damaged[:place]
        else:
            damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        assert any(str(path) in line for line in faults(folder)), (path, place)
        with contextlib.suppress(BlmError):
            open_dataset(folder)
        path.write_bytes(whole)
    assert not faults(folder)
