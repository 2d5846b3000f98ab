"""Render episodes: videos with overlays, contact sheets, suite sheets, Rerun recordings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from blm.datasets.lerobot import open_dataset
from blm.datasets.video import encode
from blm.io import replacing
from blm.types import BlmError, Episode, ImageArray

MIN_VIDEO_PICTURE = 256
"""Minimum height of a camera's image in a video [px]; smaller images are enlarged."""
MIN_SHEET_PICTURE = 160
"""Minimum height of a camera's image in a sheet [px]."""
MIN_VIDEO_WIDTH = 560
"""Minimum width of a video [px]: the status line needs it."""
GAP = 6
"""Space between images, and unit of all margins [px]."""
_DARK = (24, 26, 31)
PALE = (250, 250, 248)
INK = (30, 32, 38)
_GREY = (122, 126, 136)
_LIGHT = (236, 238, 242)
_GREEN = (46, 160, 82)
_RED = (196, 62, 52)
_PRIMITIVE_COLORS = (
    (86, 156, 214),
    (229, 164, 70),
    (196, 92, 142),
    (124, 190, 116),
    (150, 122, 214),
    (90, 184, 178),
    (222, 110, 88),
    (206, 198, 104),
    (160, 164, 172),
)
"""Colours of the primitives in the order of their first appearance; no task has more."""


# --- videos ---------------------------------------------------------------------------------------


def write_mp4(episode: Episode, path: Path, fps: int = 20, gripper: int | None = -1) -> Path:
    """Write a video of all cameras side by side, with a status line and a timeline.

    The status line shows primitive, gripper opening, success and time. The bar at the bottom shows
    the whole episode: a colour for each primitive, a green line while the task is solved, a white
    mark at the current frame. `gripper` is its place in the state; None: there is none. Raises
    BlmError for an episode without images.
    """
    _require_pictures(episode)
    frames = np.stack([video_frame(episode, t, fps, gripper) for t in range(len(episode))])
    with replacing(path, ".mp4") as temporary:
        encode(temporary, frames, fps)
    return path


def video_frame(episode: Episode, t: int, fps: int = 20, gripper: int | None = -1) -> ImageArray:
    """Return frame `t` of the video [H, W, 3]; both sides are even, as the codec needs."""
    pictures = [_enlarge(frames[t], MIN_VIDEO_PICTURE) for frames in episode.images.values()]
    strip = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    width = max(MIN_VIDEO_WIDTH, strip + 2 * GAP)
    lines = _wrap_text(episode.instruction, 17, width - 4 * GAP)
    top = 22 * len(lines) + 2 * GAP
    bottom = top + max(picture.height for picture in pictures)
    canvas = Image.new("RGB", (width + width % 2, bottom + 54 + bottom % 2), _DARK)
    draw = ImageDraw.Draw(canvas)
    for row, line in enumerate(lines):
        draw.text((2 * GAP, GAP + 22 * row), line, _LIGHT, font(17))
    x = (canvas.width - strip) // 2
    for camera, picture in zip(episode.images, pictures, strict=True):
        canvas.paste(picture, (x, top))
        _draw_camera_name(draw, (x + 4, top + 4), camera)
        x += picture.width + GAP
    if gripper is not None:
        _draw_gripper(draw, float(np.clip(episode.states[t, gripper], 0, 1)), bottom + 20)
    _draw_status_line(draw, episode, t, fps, bottom + 20)
    _draw_timeline(draw, episode, t, canvas.size)
    return np.asarray(canvas)


def _draw_gripper(draw: ImageDraw.ImageDraw, opening: float, y: int) -> None:
    """Draw the opening of the gripper into the status line around height `y`."""
    draw.text((150, y), "gripper", _GREY, font(14), anchor="lm")
    draw.rounded_rectangle((206, y - 6, 286, y + 6), 6, outline=_GREY)
    if opening > 0.05:
        draw.rounded_rectangle((208, y - 4, 208 + 76 * opening, y + 4), 4, _LIGHT)


def _draw_status_line(draw: ImageDraw.ImageDraw, episode: Episode, t: int, fps: int, y: int) -> None:
    """Draw the status line around height `y`: primitive, success, time."""
    right = int(draw.im.size[0]) - 2 * GAP
    name = episode.primitives[t] if episode.primitives else ""
    if name:
        draw.rounded_rectangle((2 * GAP, y - 9, 3 * GAP + 12, y + 9), 4, _primitive_color(episode, t))
        draw.text((4 * GAP + 12, y), name, _LIGHT, font(15), anchor="lm")
    done = t >= first_success_frame(episode)
    draw.ellipse((312, y - 7, 326, y + 7), _GREEN if done else None, _GREEN if done else _GREY)
    if done:
        draw.line([(315, y), (318, y + 3), (323, y - 4)], _LIGHT, 2)
    draw.text((332, y), "success", _LIGHT if done else _GREY, font(14), anchor="lm")
    time = f"{t / fps:.2f} s   frame {t + 1}/{len(episode)}"
    draw.text((right, y), time, _GREY, font(14), anchor="rm")


def _draw_timeline(draw: ImageDraw.ImageDraw, episode: Episode, t: int, size: tuple[int, int]) -> None:
    """Draw the episode as a bar along the lower edge, with a white mark at frame `t`."""
    left = 2 * GAP
    step = (size[0] - 4 * GAP) / len(episode)
    y = size[1] - 14
    for frame in range(len(episode)):
        color = _primitive_color(episode, frame)
        draw.rectangle((left + frame * step, y, left + (frame + 1) * step, y + 5), color)
    start = first_success_frame(episode)
    if start < len(episode):
        draw.rectangle((left + start * step, y + 7, left + len(episode) * step, y + 8), _GREEN)
    draw.rectangle((left + t * step - 1, y - 3, left + (t + 1) * step + 1, y + 8), (255, 255, 255))


def first_success_frame(episode: Episode) -> int:
    """Return the frame from which the success rule holds until the end, or the number of frames."""
    last = len(episode) - 1
    return int(episode.metrics.get("success_step", last)) if episode.success else last + 1


def _primitive_color(episode: Episode, t: int) -> tuple[int, int, int]:
    names = list(dict.fromkeys(episode.primitives))
    return _PRIMITIVE_COLORS[names.index(episode.primitives[t]) % len(_PRIMITIVE_COLORS)] if names else _GREY


# --- sheets ---------------------------------------------------------------------------------------


def contact_sheet(episodes: Sequence[Episode], path: Path, moments: int = 6, fps: int = 20) -> Path:
    """Write a PNG with `moments` evenly spaced frames of each episode, one row per camera.

    A green line marks the frames at which the task is solved. Raises BlmError without episodes or
    images.
    """
    if not episodes:
        raise BlmError("a contact sheet needs at least one episode")
    return save_png(_stack_vertically([_episode_block(episode, moments, fps) for episode in episodes]), path)


def suite_sheet(episodes: Mapping[tuple[str, str], Episode], path: Path, moments: int = 3) -> Path:
    """Write one PNG of a suite, one row per task and one column per robot.

    `episodes` maps (robot, task) to an episode. A cell shows `moments` evenly spaced frames of the
    episode's first camera; it is grey without an episode. Raises BlmError without episodes or
    images.
    """
    if not episodes:
        raise BlmError("a suite sheet needs at least one episode")
    robots, tasks = (list(dict.fromkeys(key[i] for key in episodes)) for i in (0, 1))
    strips = {key: _camera_strip(episode, moments) for key, episode in episodes.items()}
    width, height = (max(strip.size[i] for strip in strips.values()) for i in (0, 1))
    label = 168
    head = 36
    size = (label + len(robots) * (width + 2 * GAP), head + len(tasks) * (height + 2 * GAP))
    sheet = Image.new("RGB", size, PALE)
    draw = ImageDraw.Draw(sheet)
    for column, robot in enumerate(robots):
        x = label + column * (width + 2 * GAP)
        draw.text((x + width // 2, head // 2), robot, INK, font(22), anchor="mm")
        for row, task in enumerate(tasks):
            y = head + row * (height + 2 * GAP)
            if (robot, task) in strips:
                sheet.paste(strips[robot, task], (x, y))
            else:
                draw.rectangle((x, y, x + width, y + height), (232, 232, 230))
    for row, task in enumerate(tasks):
        y = head + row * (height + 2 * GAP) + height // 2
        words = "\n".join(_wrap_text(task.replace("_", " "), 22, label - 4 * GAP))
        draw.multiline_text((2 * GAP, y), words, INK, font(22), anchor="lm")
    return save_png(sheet, path)


def collection_sheet(collection: Path, path: Path) -> Path:
    """Write the suite sheet of a collection, with the first episode of every robot and task.

    Raises BlmError for a folder without datasets.
    """
    datasets = [open_dataset(info.parents[1]) for info in sorted(collection.glob("*/meta/info.json"))]
    if not datasets:
        raise BlmError(f"'{collection}' holds no datasets; name the folder that 'blm collect' wrote")
    first: dict[tuple[str, str], Episode] = {}
    for data in datasets:
        for number, task in enumerate(data.tasks):
            if (data.space.robot, task) not in first:
                first[data.space.robot, task] = data.episode(number)
    return suite_sheet(first, path)


def _episode_block(episode: Episode, moments: int, fps: int) -> Image.Image:
    """Draw one episode of a contact sheet, under a title."""
    _require_pictures(episode)
    rows = [_camera_strip(episode, moments, camera) for camera in episode.images]
    width = max(row.width for row in rows) + 2 * GAP
    outcome = "success" if episode.success else "failure"
    title = f"{episode.robot}  {episode.task}  seed {episode.seed}"
    lines = _wrap_text(episode.instruction, 15, width - 2 * GAP)
    top = 26 + 20 * len(lines)
    block = Image.new("RGB", (width, top + 22 + sum(row.height + 4 for row in rows)), PALE)
    draw = ImageDraw.Draw(block)
    draw.text((GAP, 5), title, INK, font(17))
    tint = _GREEN if episode.success else _RED
    draw.text((width - GAP, 5), outcome, tint, font(17), anchor="ra")
    for row, line in enumerate(lines):
        draw.text((GAP, 26 + 20 * row), line, _GREY, font(15))
    y = top + 4
    for camera, picture in zip(episode.images, rows, strict=True):
        block.paste(picture, (GAP, y))
        _draw_camera_name(draw, (GAP + 3, y + 3), camera)
        y += picture.height + 4
    step = (rows[0].width + 4) // moments
    for column, t in enumerate(_evenly_spaced_frames(episode, moments)):
        name = episode.primitives[t] if episode.primitives else ""
        draw.text((GAP + column * step + 2, y), f"{t / fps:.1f} s  {name}", INK, font(13))
    return block


def _camera_strip(episode: Episode, moments: int, camera: str = "") -> Image.Image:
    """Draw frames of one camera side by side (default: the first); solved ones get a green line."""
    _require_pictures(episode)
    frames = episode.images[camera or next(iter(episode.images))]
    times = _evenly_spaced_frames(episode, moments)
    pictures = [_enlarge(frames[t], MIN_SHEET_PICTURE) for t in times]
    width, height = pictures[0].size
    strip = Image.new("RGB", ((width + 4) * moments - 4, height), PALE)
    draw = ImageDraw.Draw(strip)
    for column, (t, picture) in enumerate(zip(times, pictures, strict=True)):
        x = column * (width + 4)
        strip.paste(picture, (x, 0))
        if t >= first_success_frame(episode):
            draw.rectangle((x, height - 5, x + width - 1, height - 1), _GREEN)
    return strip


def _evenly_spaced_frames(episode: Episode, count: int) -> list[int]:
    """Return the indices of `count` frames, the first and the last among them."""
    return [int(t) for t in np.linspace(0, len(episode) - 1, count).round()]


# --- helpers --------------------------------------------------------------------------------------


def _require_pictures(episode: Episode) -> None:
    if not episode.images:
        raise BlmError(
            f"episode of '{episode.task}' (seed {episode.seed}) has no images; load it with cameras"
        )


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font of all drawn text in a size [px]."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow returns this type if a size is given
    return font


def _enlarge(frame: ImageArray, height: int) -> Image.Image:
    """Return the image, enlarged to `height` [px] with its aspect ratio if it is smaller."""
    picture = Image.fromarray(frame)
    if picture.height >= height:
        return picture
    return picture.resize((round(picture.width * height / picture.height), height), Image.Resampling.LANCZOS)


def _wrap_text(text: str, size: int, width: int) -> list[str]:
    """Break `text` into lines of at most `width` px."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font(size).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _draw_camera_name(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str) -> None:
    """Draw the name of a camera into the corner of its image."""
    x, y, right, bottom = draw.textbbox((corner[0] + 5, corner[1] + 2), text, font(13))
    draw.rounded_rectangle((x - 5, y - 3, right + 5, bottom + 3), 4, _DARK)
    draw.text((corner[0] + 5, corner[1] + 2), text, _LIGHT, font(13))


def _stack_vertically(blocks: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (max(b.width for b in blocks), sum(b.height for b in blocks)), PALE)
    y = 0
    for block in blocks:
        sheet.paste(block, (0, y))
        y += block.height
    return sheet


def save_png(picture: Image.Image, path: Path) -> Path:
    """Write a PNG and return its path."""
    with replacing(path, ".png") as temporary:
        picture.save(temporary)
    return path


def _jpeg(frame: ImageArray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


# --- Rerun ----------------------------------------------------------------------------------------


def write_rerun(
    episode: Episode,
    path: Path,
    fps: int = 20,
    names: Sequence[str] = (),
    state_names: Sequence[str] | None = None,
) -> Path:
    """Write a Rerun recording (.rrd): cameras, a curve per joint, gripper, primitive, success.

    `names` are those of the action space [D], by default joints and the gripper; `state_names` [S]
    are those of the state, by default the same. Timelines: "time" [s] and "frame".
    Raises BlmError if the extra `blm[viewer]` is not installed, or for a wrong number of names.
    """
    try:
        import rerun as rr
        import rerun.blueprint as rrb
    except ModuleNotFoundError as error:
        raise BlmError("Rerun is not installed; run: pip install 'blm[viewer]'") from error
    dim = episode.actions.shape[1]
    names = tuple(names) or (*(f"joint{i + 1}" for i in range(dim - 1)), "gripper")
    if len(names) != dim:
        raise BlmError(f"{len(names)} names for {dim} dimensions of '{episode.robot}': {', '.join(names)}")
    states = names if state_names is None else state_names
    if len(states) != episode.states.shape[1]:
        raise BlmError(f"{len(states)} names for {episode.states.shape[1]} dimensions of the state")
    with replacing(path, ".rrd") as temporary:
        _write_recording(rr, rrb, temporary, episode, {"state": states, "action": names}, fps)
    return path


def _write_recording(
    rr: Any, rrb: Any, path: Path, episode: Episode, names: Mapping[str, Sequence[str]], fps: int
) -> None:
    frames = np.arange(len(episode))
    recording = rr.RecordingStream("blm", recording_id=f"{episode.robot}-{episode.task}-{episode.seed}")
    cameras = [rrb.Spatial2DView(origin=f"camera/{camera}", name=camera) for camera in episode.images]
    curves = [
        rrb.TimeSeriesView(name="joints [rad]", contents=["/state/**", "/action/**", "- /**/gripper"]),
        rrb.TimeSeriesView(name="gripper, success", contents=["/**/gripper", "/success"]),
    ]
    texts = [rrb.TextDocumentView(origin="instruction"), rrb.TextLogView(origin="primitive")]
    layout = rrb.Vertical(
        rrb.Horizontal(*cameras, rrb.Vertical(*texts)), rrb.Horizontal(*curves, column_shares=[2, 1])
    )
    recording.save(path, default_blueprint=rrb.Blueprint(layout, collapse_panels=True))
    recording.log("instruction", rr.TextDocument(episode.instruction), static=True)

    def times(chosen: Any) -> list[Any]:
        return [rr.TimeColumn("time", duration=chosen / fps), rr.TimeColumn("frame", sequence=chosen)]

    series = {"success": (frames >= first_success_frame(episode)).astype(float)}
    arrays = {"state": episode.states, "action": episode.actions}
    if episode.executed is not None and not np.array_equal(episode.executed, episode.actions):
        arrays["executed"] = episode.executed
    for kind, values in arrays.items():
        called = names["state" if kind == "state" else "action"]
        series |= {f"{kind}/{name}": values[:, i] for i, name in enumerate(called)}
    for name, curve in series.items():
        recording.log(name, rr.SeriesLines(names=name), static=True)
        recording.send_columns(name, times(frames), rr.Scalars.columns(scalars=curve.astype(np.float64)))
    changes = [t for t, name in enumerate(episode.primitives) if t == 0 or episode.primitives[t - 1] != name]
    if changes:
        texts_said = [episode.primitives[t] for t in changes]
        recording.send_columns("primitive", times(np.array(changes)), rr.TextLog.columns(text=texts_said))
    for camera, pictures in episode.images.items():
        column = rr.EncodedImage.columns(
            blob=[_jpeg(picture) for picture in pictures], media_type=["image/jpeg"] * len(episode)
        )
        recording.send_columns(f"camera/{camera}", times(frames), column)
    recording.flush()
    recording.disconnect()
