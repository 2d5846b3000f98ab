"""Datasets under bad luck: full disks, folders that refuse, kills at any moment, altered files."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blm.datasets import lerobot_writer as writing_module
from blm.datasets.files import MANIFEST
from blm.datasets.lerobot import finalize_dataset, open_dataset, stage_episode, verify_files
from blm.datasets.lerobot_writer import DATA_FILE
from blm.io import DamagedError, recover_folder, write_json
from blm.types import BlmError
from tests.support.episodes import EPISODES, SIDE, SPACE, make_episode, write
from tests.support.kills import killed_at

LAYOUT = {"space": SPACE, "cameras": ("base", "wrist"), "image_size": SIDE, "provenance": {"suite": "1"}}


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def staged(tmp_path):
    return [stage_episode(tmp_path / "staging", f"{e.task}/{e.seed}", e) for e in EPISODES]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


# --- manifest ---


def test_manifest_lists_every_file_with_its_hash(tmp_path):
    folder = write(tmp_path, EPISODES)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert sorted(manifest["files"]) == sorted(set(contents(folder)) - {MANIFEST})
    assert (manifest["format"], manifest["provenance"]) == (2, {"suite": "1"})
    assert open_dataset(folder).provenance == {"suite": "1"}
    assert verify_files(folder) == []


def test_content_hash_is_of_the_content_of_videos_too(tmp_path, staged):
    first = finalize_dataset(staged, tmp_path / "a", **LAYOUT)
    second = finalize_dataset(staged, tmp_path / "b", **LAYOUT | {"provenance": {"machine": "other"}})
    third = write(tmp_path / "c", [*EPISODES[:2], make_episode(4, 7, task="pick", instruction="pick")])
    hashes = [open_dataset(folder).content_hash for folder in (first, second, third)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_every_altered_file_is_named(tmp_path):
    folder = write(tmp_path, EPISODES)
    video, data = (
        next(folder.glob(f"{part}/**/*.{kind}")) for part, kind in (("videos", "mp4"), ("data", "parquet"))
    )
    tasks = folder / "meta/tasks.parquet"
    changed = bytearray(video.read_bytes())
    changed[len(changed) // 2] ^= 1
    video.write_bytes(changed)
    assert open_dataset(folder).num_frames == 28, "opening stays fast: it hashes no video"
    data.write_bytes(data.read_bytes() + b"x")
    tasks.unlink()
    (folder / "data/chunk-000/file-001.parquet").write_bytes(b"")
    said = [str(error) for error in verify_files(folder)]
    assert len(said) == 4
    for path, reason in (
        (video, "another SHA-256"),
        (data, "bytes, the manifest says"),
        (tasks, "is missing"),
    ):
        assert any(str(path) in line and reason in line for line in said), said
    assert any("file-001.parquet' is not in the manifest" in line for line in said)


def test_a_description_changed_by_hand_is_refused(tmp_path):
    path = write(tmp_path, EPISODES) / "meta/info.json"
    info = json.loads(path.read_text())
    info["blm"]["action_space"]["units"] = ["deg", "deg", "opening"]
    path.write_text(json.dumps(info, indent=2) + "\n")
    with pytest.raises(DamagedError, match=r"info\.json' has another SHA-256"):
        open_dataset(path.parents[1])
    (path.parent / "manifest.json").unlink()
    with pytest.raises(DamagedError, match=r"manifest\.json' is missing"):
        open_dataset(path.parents[1])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("meta/info.json", b"{", "cannot be read"),
        ("meta/info.json", b"[]", "cannot be read"),
        ("meta/stats.json", b"{}", "lacks 'observation.state'"),
        ("meta/manifest.json", b"{", "cannot be read"),
        ("data/chunk-000/file-000.parquet", b"PAR1", "cannot be read"),
        ("meta/episodes/chunk-000/file-000.parquet", b"", "cannot be read"),
        ("meta/tasks.parquet", None, "cannot be read"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, said):
    path = write(tmp_path, EPISODES) / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BlmError, match=said) as caught:
        open_dataset(tmp_path / "arm")
    assert str(path) in str(caught.value)


def test_errors_can_be_pickled_by_worker_processes():
    error = pickle.loads(pickle.dumps(DamagedError("a video is cut", "restore it")))
    assert (str(error), error.fix) == ("a video is cut; restore it", "restore it")


# --- disks that refuse ---


def test_a_full_disk_is_named_and_keeps_what_was_finished(small_disk):
    kept = stage_episode(small_disk, "push/1", make_episode(1, 9))
    with pytest.raises(
        BlmError, match=r"cannot write to '.*disk/push/.*': the disk is full.*run the same command again"
    ):
        for seed in range(2, 60):
            stage_episode(small_disk, f"push/{seed}", make_episode(seed, 9))
    names = sorted(path.name for path in (small_disk / "push").iterdir())
    assert names and not any(name.startswith(".") for name in names), names
    assert {path.name for path in kept.iterdir()} == {"base.mp4", "wrist.mp4", "vectors.npz", "episode.json"}
    staged = [small_disk / "push" / name for name in names]
    with pytest.raises(BlmError, match=r"cannot write to '.*arm': the disk is full"):
        finalize_dataset(staged, small_disk / "arm", **LAYOUT)
    assert [path.name for path in small_disk.iterdir()] == ["push"]
    with pytest.raises(BlmError, match="the disk is full"):
        write_json(small_disk / "summary.json", "x" * 100_000)
    out = finalize_dataset(staged, small_disk.parent / "arm", **LAYOUT)
    assert open_dataset(out).num_episodes == len(names)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_refused_dataset_leaves_the_former_one(tmp_path, staged, monkeypatch, code):
    out = finalize_dataset(staged[:1], tmp_path / "arm", **LAYOUT)
    before = contents(out)

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writing_module, "concatenate", refuse)
    with pytest.raises(BlmError, match=r"cannot write to '.*arm'"):
        finalize_dataset(staged, out, **LAYOUT)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arm", "staging"]
    monkeypatch.undo()
    assert open_dataset(finalize_dataset(staged, out, **LAYOUT)).num_episodes == 3


def test_a_file_in_the_place_of_a_folder_is_refused_and_kept(tmp_path, staged):
    (tmp_path / "arm").write_text("notes")
    with pytest.raises(BlmError, match=r"'.*arm'.*a file is where a folder should be"):
        finalize_dataset(staged, tmp_path / "arm", **LAYOUT)
    with pytest.raises(BlmError, match=r"'.*arm/push/1'.*a file is where a folder should be"):
        stage_episode(tmp_path / "arm", "push/1", EPISODES[0])
    assert (tmp_path / "arm").read_text() == "notes"


def test_a_folder_without_permission_is_named(tmp_path, staged):
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nobody: root may write everywhere
    try:
        with pytest.raises(BlmError, match=r"cannot write to '.*shut': permission is denied"):
            stage_episode(shut, "push/1", EPISODES[0])
    finally:
        os.seteuid(user)
    assert list(shut.iterdir()) == []


# --- kills ---

FINALIZE = """
import json, sys
from pathlib import Path
from tests.datasets.test_faults import LAYOUT
from blm.datasets.lerobot import finalize_dataset
print("ready", flush=True)
for _ in range(int(sys.argv[3])):
    finalize_dataset([Path(p) for p in json.loads(sys.argv[1])], Path(sys.argv[2]), **LAYOUT)
"""


def test_killed_while_writing_a_rerun_gives_the_same_bytes(tmp_path):
    """Kills a process that writes the dataset over and over, at moments spread over one writing."""
    episodes = [make_episode(seed, 40) for seed in range(6)]
    staged = [stage_episode(tmp_path / "staging", f"push/{e.seed}", e) for e in episodes]
    began = time.perf_counter()
    expected = contents(finalize_dataset(staged, tmp_path / "calm", **LAYOUT))
    duration = time.perf_counter() - began
    out, states = tmp_path / "arm", set()
    arguments = [json.dumps([str(path) for path in staged]), str(out), "1000"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", FINALIZE, *arguments]
    for share in (0.15, 0.4, 0.7, 0.95, 1.3, 1.8):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(share * duration)
            process.send_signal(signal.SIGKILL)
        states.add(frozenset(path.name for path in tmp_path.iterdir()))
        if out.exists():
            assert contents(recover_folder(out)) == expected, "what has the final name is whole"
        assert contents(finalize_dataset(staged, out, **LAYOUT)) == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == ["arm", "calm", "staging"]
    hidden = {name for names in states for name in names if name.startswith(".arm.")}
    assert hidden, "no kill came in the middle"


@pytest.mark.slow
def test_killed_between_two_renames_the_former_dataset_comes_back(tmp_path, staged):
    out = finalize_dataset(staged, tmp_path / "arm", **LAYOUT)
    expected, missing = contents(out), 0
    for step in range(1, 400):
        if not killed_at(step, lambda: finalize_dataset(staged, out, **LAYOUT), exchange=False):
            break
        missing += not out.exists()
        assert open_dataset(out).num_episodes == 3 and contents(out) == expected
    assert missing and step > 30
    finalize_dataset(staged, out, **LAYOUT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arm", "staging"]


# --- other people's data ---


def test_only_the_same_collection_is_replaced(tmp_path, staged):
    out = finalize_dataset(staged, tmp_path / "arm", **LAYOUT)
    with pytest.raises(BlmError, match=r"arm' holds a dataset of another collection; choose another folder"):
        finalize_dataset(staged, out, **LAYOUT | {"provenance": {"collect": {"episodes": 7}}})
    (out / "notes.txt").write_text("mine")
    (out / "README.md").write_text("mine too")
    finalize_dataset(staged[:1], out, **LAYOUT)
    assert open_dataset(out).num_episodes == 1 and (out / "notes.txt").read_text() == "mine"
    for name in ("meta/info.json", DATA_FILE):
        changed = finalize_dataset(staged, tmp_path / name.replace("/", "-"), **LAYOUT)
        with (changed / name).open("ab") as file:
            file.write(b" ")
        before = contents(changed)
        with pytest.raises(BlmError, match=r"is not replaced; choose another folder, or move it away"):
            finalize_dataset(staged, changed, **LAYOUT)
        assert contents(changed) == before


@pytest.mark.parametrize("name", ["meta/info.json", "data/a.parquet", "thesis.tex"])
def test_folders_of_other_programs_are_refused_and_kept(tmp_path, staged, name):
    file = tmp_path / "arm" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.raises(BlmError, match=r"nothing in it shows that this program wrote it; choose another"):
        finalize_dataset(staged, tmp_path / "arm", **LAYOUT)
    with pytest.raises(BlmError, match=r"cannot be read|not a staged episode"):
        stage_episode(tmp_path, "arm", EPISODES[0])
    assert contents(tmp_path / "arm") == {name: b"{}"}
