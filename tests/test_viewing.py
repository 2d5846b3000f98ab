"""Videos and contact sheets show every frame and every episode."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest
from PIL import Image

from blm import viewing
from blm.data.video import VideoFile, count_frames
from blm.types import BlmError, Episode

T, SIDE = 8, 64
EPISODE = Episode(
    robot="panda",
    task="push_cube",
    seed=7,
    instruction="Push the cube to the disc.",
    states=np.zeros((T, 8), np.float32),
    actions=np.zeros((T, 8), np.float32),
    images={
        "base": np.full((T, SIDE, SIDE, 3), 200, np.uint8),
        "wrist": np.full((T, SIDE, SIDE, 3), 60, np.uint8),
    },
    primitives=("push",) * T,
)


def test_mp4_has_all_frames_and_cameras_side_by_side(tmp_path):
    path = viewing.write_mp4(EPISODE, tmp_path / "e.mp4")
    assert count_frames(path) == T
    frame = VideoFile(path).read(T - 1)
    assert frame.shape == (SIDE + viewing.CAPTION, 2 * SIDE, 3)
    assert abs(frame[:SIDE, :SIDE].mean() - 200) < 4
    assert abs(frame[:SIDE, SIDE:].mean() - 60) < 4
    assert frame[SIDE:].max() > 100  # the caption
    assert [p.name for p in tmp_path.iterdir()] == ["e.mp4"]


def test_contact_sheet_has_a_row_for_each_episode(tmp_path):
    failed = dataclasses.replace(EPISODE, success=False, images={"base": EPISODE.images["base"][:3]})
    path = viewing.contact_sheet([EPISODE, failed], tmp_path / "sheet.png", moments=4)
    with Image.open(path) as sheet:
        assert sheet.size == (4 * 2 * SIDE, 2 * (SIDE + viewing.CAPTION))
        pixels = np.asarray(sheet)
    assert (pixels[SIDE + viewing.CAPTION : -viewing.CAPTION, : 4 * SIDE] == 200).all()


def test_an_episode_without_pictures_is_refused(tmp_path):
    with pytest.raises(BlmError, match="no pictures"):
        viewing.write_mp4(dataclasses.replace(EPISODE, images={}), tmp_path / "e.mp4")


def test_rerun_recording_or_the_command_that_installs_it(tmp_path):
    if importlib.util.find_spec("rerun") is None:
        with pytest.raises(BlmError, match="pip install"):
            viewing.write_rerun(EPISODE, tmp_path / "e.rrd")
    else:
        assert viewing.write_rerun(EPISODE, tmp_path / "e.rrd").stat().st_size > 0
