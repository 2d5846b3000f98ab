"""Videos, sheets and recordings show every frame and episode, and say what is going on in them."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blm.app import viewing
from blm.app.plus_sheets import plus_sheet
from blm.datasets.video import VideoFile, count_frames
from blm.tasks import Env
from blm.types import BlmError, Episode, ImageArray

T, SIDE = 8, 64
EPISODE = Episode(
    robot="panda",
    task="push_cube",
    seed=7,
    instruction="Push the cube to the disc.",
    states=np.zeros((T, 8), np.float32),
    actions=np.ones((T, 8), np.float32),
    images={
        "base": np.full((T, SIDE, SIDE, 3), 200, np.uint8),
        "wrist": np.full((T, SIDE, SIDE, 3), 60, np.uint8),
    },
    primitives=("approach",) * 4 + ("push",) * 4,
    metrics={"success_step": 6},
)
FAILED = dataclasses.replace(EPISODE, success=False, images={"base": EPISODE.images["base"]})


def green(picture: ImageArray) -> int:
    """Number of pixels in the colour of success, as far as a video keeps it."""
    return int((np.abs(picture.astype(int) - viewing._GREEN).max(-1) < 24).sum())


def test_mp4_has_all_frames_with_cameras_side_by_side(tmp_path: Path) -> None:
    path = viewing.write_mp4(EPISODE, tmp_path / "e.mp4")
    assert count_frames(path) == T
    frame = VideoFile(path).read(T - 1)
    side = viewing.MIN_VIDEO_PICTURE
    assert side >= 224 and frame.shape[0] > side and frame.shape[1] >= 2 * side
    assert (np.abs(frame.astype(int) - 200).max(-1) < 6).sum() > 0.9 * side * side  # the enlarged pictures
    assert (np.abs(frame.astype(int) - 60).max(-1) < 6).sum() > 0.9 * side * side
    assert [p.name for p in tmp_path.iterdir()] == ["e.mp4"]


def test_success_shows_from_its_first_frame_on() -> None:
    marks = [green(viewing.video_frame(EPISODE, t)[:-20]) for t in range(T)]  # without the bar at the bottom
    assert max(marks[:6]) == 0 and min(marks[6:]) > 50
    assert [viewing.first_success_frame(e) for e in (EPISODE, FAILED)] == [6, T]
    assert green(viewing.video_frame(FAILED, T - 1)) == 0


def differs(one: Episode, other: Episode, t: int) -> bool:
    return not np.array_equal(viewing.video_frame(one, t), viewing.video_frame(other, t))


def test_the_status_line_depends_on_the_episode() -> None:
    opened = np.zeros((T, 8), np.float32)
    opened[5, -1] = 0.7
    for change in (
        {"instruction": "Push the cube to the circle."},
        {"states": opened},
        {"primitives": ("approach",) * 4 + ("pull",) * 4},
    ):
        other = dataclasses.replace(EPISODE, **change)
        assert differs(EPISODE, other, 5), change
    assert not np.array_equal(viewing.video_frame(EPISODE, 4), viewing.video_frame(EPISODE, 5))  # the time


@pytest.mark.parametrize("side", [63, 64, 301])
def test_any_picture_size_and_a_long_instruction_fit(side: int) -> None:
    images = {"base": np.zeros((T, side, side, 3), np.uint8)}
    wide = dataclasses.replace(EPISODE, images=images, instruction="word " * 60, primitives=())
    frame = viewing.video_frame(wide, 0)
    assert frame.shape[0] % 2 == frame.shape[1] % 2 == 0
    assert frame.shape[0] > max(side, viewing.MIN_VIDEO_PICTURE)


def test_contact_sheet_has_a_row_for_each_camera_of_each_episode(tmp_path: Path) -> None:
    path = viewing.contact_sheet([EPISODE, FAILED], tmp_path / "sheet.png", moments=4)
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet)
    side = viewing.MIN_SHEET_PICTURE
    assert pixels.shape[0] > 3 * side and pixels.shape[1] >= 4 * side
    shown = (pixels == 200).all(-1).sum() / side**2, (pixels == 60).all(-1).sum() / side**2
    assert 7 < shown[0] <= 8 and 3.5 < shown[1] <= 4  # two episodes, four moments; tags and marks cover some
    with pytest.raises(BlmError, match="at least one episode"):
        viewing.contact_sheet([], path)


def test_suite_sheet_has_a_cell_for_each_robot_and_task(tmp_path: Path) -> None:
    cells = {("panda", "push_cube"): EPISODE, ("xarm6", "push_cube"): FAILED, ("panda", "pick_cube"): EPISODE}
    path = viewing.suite_sheet(cells, tmp_path / "suite.png", moments=3)
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet)
    side = viewing.MIN_SHEET_PICTURE
    assert pixels.shape[0] > 2 * side and pixels.shape[1] > 2 * 3 * side
    assert 8.5 < (pixels == 200).all(-1).sum() / side**2 <= 9  # three cells; the fourth one is empty
    assert green(pixels) == 2 * 5 * side  # one solved moment in each of two cells
    with pytest.raises(BlmError, match="at least one episode"):
        viewing.suite_sheet({}, path)


def test_a_plus_sheet_shows_every_axis_and_level() -> None:
    with closing(Env("panda", "push_cube", cameras=("base", "wrist"), image_size=112)) as env:
        sheet = np.asarray(plus_sheet(env, seed=3)).astype(int)
    rows, columns = 7, 5
    height, width = (sheet.shape[0] - 30) // rows, (sheet.shape[1] - 120) // columns
    cells = [
        [sheet[30 + r * height :][:112, 120 + c * width :][:, :226] for c in range(columns)]
        for r in range(rows)
    ]
    assert all(np.array_equal(cells[0][0], cell) for cell in cells[0])
    for row in cells[1:]:
        assert all(np.abs(cell - cells[0][0]).mean() > 0.5 for cell in row)
        assert all(not np.array_equal(one, other) for one, other in pairwise(row))


def test_an_episode_without_pictures_is_refused(tmp_path: Path) -> None:
    blind = dataclasses.replace(EPISODE, images={})
    for write in (
        lambda: viewing.write_mp4(blind, tmp_path / "e.mp4"),
        lambda: viewing.contact_sheet([blind], tmp_path / "e.png"),
        lambda: viewing.suite_sheet({("panda", "push_cube"): blind}, tmp_path / "e.png"),
    ):
        with pytest.raises(BlmError, match="no images"):
            write()
    assert not list(tmp_path.iterdir())


def test_rerun_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(BlmError, match=r"pip install 'blm\[viewer\]'"):
        viewing.write_rerun(EPISODE, tmp_path / "e.rrd")


@pytest.mark.skipif(importlib.util.find_spec("rerun") is None, reason="needs the extra blm[viewer]")
def test_rerun_recording_holds_every_curve_picture_and_text(tmp_path: Path) -> None:
    from rerun.chunk import RrdReader

    names = [f"arm_{i}" for i in range(7)] + ["gripper"]
    shifted = dataclasses.replace(EPISODE, executed=EPISODE.actions + 1)
    path = viewing.write_rerun(shifted, tmp_path / "e.rrd", names=names)
    assert [p.name for p in tmp_path.iterdir()] == ["e.rrd"]
    reader = RrdReader(path)
    (store,) = reader.recordings()
    assert (store.application_id, store.recording_id) == ("blm", "panda-push_cube-7")
    found = {c.entity_path: c for c in reader.stream() if not c.is_static}
    curves = {f"/{kind}/{name}" for kind in ("state", "action", "executed") for name in names}
    assert set(found) == curves | {"/success", "/primitive", "/camera/base", "/camera/wrist"}
    assert {path: chunk.num_rows for path, chunk in found.items()} == dict.fromkeys(found, T) | {
        "/primitive": 2
    }
    assert all(set(chunk.timeline_names) == {"time", "frame"} for chunk in found.values())

    def column(path: str, name: str) -> list[object]:
        return found[path].to_record_batch().column(name).to_pylist()

    assert column("/success", "Scalars:scalars") == [[0.0]] * 6 + [[1.0]] * 2
    assert column("/executed/gripper", "Scalars:scalars") == [[2.0]] * T
    assert column("/primitive", "TextLog:text") == [["approach"], ["push"]]
    assert column("/primitive", "frame") == [0, 4]
    with pytest.raises(BlmError, match="2 names for 8 dimensions of 'panda': a, b"):
        viewing.write_rerun(EPISODE, path, names=["a", "b"])
