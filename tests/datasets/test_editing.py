"""`blm data`: what is kept is the same, bit for bit; numbers and metadata fit; nothing is half written."""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import numpy as np
import pytest

from blm.app.doctor import examine_path
from blm.datasets import editing
from blm.datasets.editing import Selection, select_episodes
from blm.datasets.lerobot import open_dataset
from blm.types import BlmError
from tests.support.commands import run_command
from tests.support.foreign_datasets import LENGTHS, write_v2, write_v3
from tests.support.hidden_states import make_dataset
from tests.support.lerobot_forms import FORMS, Form, write_form

WRITERS = {"v2.1": write_v2, "v3.0": write_v3}


def episodes(folder):
    """Return what each episode holds."""
    data = open_dataset(folder)
    found = []
    for i in range(data.num_episodes):
        one = data.episode(i)
        pictures = {name: frames.tobytes() for name, frames in one.images.items()}
        found.append((one.instruction, one.states.tobytes(), one.actions.tobytes(), pictures))
    return found


@pytest.mark.parametrize("version", WRITERS)
def test_episodes_that_are_kept_stay_the_same(tmp_path, version):
    whole = episodes(WRITERS[version](tmp_path / "a"))
    run_command("data delete", [str(tmp_path / "a"), str(tmp_path / "b"), "--episodes", "1"])
    assert episodes(tmp_path / "b") == [whole[i] for i in (0, 2, 3)]
    info = json.loads((tmp_path / "b/meta/info.json").read_text())
    assert (info["total_episodes"], info["total_frames"]) == (3, sum(LENGTHS) - LENGTHS[1])
    (check,) = examine_path(tmp_path / "b")
    assert not check.fix, check
    run_command("data merge", [str(tmp_path / "c"), "--datasets", str(tmp_path / "b"), str(tmp_path / "a")])
    assert episodes(tmp_path / "c") == [whole[i] for i in (0, 2, 3, 0, 1, 2, 3)]
    assert not any(check.fix for check in examine_path(tmp_path / "c"))


@pytest.mark.parametrize("version", WRITERS)
def test_a_split_has_every_episode_once(tmp_path, version):
    whole = episodes(WRITERS[version](tmp_path / "a"))
    run_command("data split", [str(tmp_path / "a"), str(tmp_path / "s"), "--held-out", "0.3"])
    parts = [episodes(tmp_path / "s" / name) for name in ("train", "held_out")]
    assert [len(part) for part in parts] == [2, 2]
    assert sorted(map(repr, parts[0] + parts[1])) == sorted(map(repr, whole))


def test_pictures_in_data_files_go_with_their_episodes(tmp_path):
    whole = episodes(write_form(tmp_path / "a", FORMS["pictures in the data files, v3.0"]))
    select_episodes([Selection(tmp_path / "a", (0, 2))], tmp_path / "b")
    assert episodes(tmp_path / "b") == [whole[0], whole[2]]


def test_reindexing_repairs_metadata(tmp_path):
    folder = write_v2(tmp_path / "a")
    whole = episodes(folder)
    (folder / "meta/episodes.jsonl").unlink()
    run_command("data reindex", [str(folder), str(tmp_path / "b")])
    assert episodes(tmp_path / "b") == whole
    assert len((tmp_path / "b/meta/episodes.jsonl").read_text().splitlines()) == len(LENGTHS)


def test_statistics_are_those_of_all_frames(tmp_path):
    folder = write_form(tmp_path / "a", Form())
    run_command("data stats", [str(folder)])
    stats = json.loads((folder / "meta/stats.json").read_text())
    data = open_dataset(folder)
    np.testing.assert_allclose(stats["action"]["q01"], np.quantile(data.actions, 0.01, axis=0), rtol=1e-5)
    np.testing.assert_allclose(stats["observation.state"]["mean"], data.states.mean(axis=0), rtol=1e-4)
    due = data.frames(np.arange(data.num_frames), "top").mean(axis=(0, 1, 2)) / 255
    mean = np.array(stats["observation.images.top"]["mean"])
    assert mean.shape == (3, 1, 1) and np.allclose(mean.ravel(), due, atol=0.01)


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    one, other = write_v2(tmp_path / "a"), write_form(tmp_path / "b", replace(Form(), version="v2.1"))
    with pytest.raises(BlmError, match=r"differ in observation\.image"):
        select_episodes([Selection(one), Selection(other)], tmp_path / "c")
    with pytest.raises(BlmError, match=r"has episodes 0\.\.3, not 9"):
        run_command("data delete", [str(one), str(tmp_path / "c"), "--episodes", "9"])
    with pytest.raises(BlmError, match="exists"):
        select_episodes([Selection(one)], other)
    make_dataset(tmp_path, "arm")
    with pytest.raises(BlmError, match="of this program"):
        select_episodes([Selection(tmp_path / "arm")], tmp_path / "c")

    def broken(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(editing.shutil, "copyfile", broken)
    with pytest.raises(BlmError):
        select_episodes([Selection(one)], tmp_path / "c")
    assert not [path for path in tmp_path.iterdir() if "c" in path.name]
