"""Look at episodes: an mp4 with all cameras, a contact sheet of many episodes, a Rerun recording."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from blm.data.video import encode
from blm.types import BlmError, Episode, ImageArray

CAPTION = 14
"""Height of a caption line [px]."""


def side_by_side(episode: Episode) -> ImageArray:
    """Return frames [T, H, W * cameras, 3]. Raises BlmError for an episode without pictures."""
    if not episode.images:
        raise BlmError(
            f"episode of '{episode.task}' (seed {episode.seed}) has no pictures; load it with cameras"
        )
    return np.concatenate(list(episode.images.values()), axis=2)


def write_mp4(episode: Episode, path: Path, fps: int = 20) -> Path:
    """Write all cameras side by side, with the instruction and the primitive in progress written below."""
    frames = side_by_side(episode)
    names = episode.primitives or ("",) * len(episode)
    captioned = [_caption(f, f"{name}  {episode.instruction}") for f, name in zip(frames, names, strict=True)]
    temporary = path.with_name(f".{path.stem}.part.mp4")
    encode(temporary, np.stack(captioned), fps)
    temporary.replace(path)
    return path


def contact_sheet(episodes: Sequence[Episode], path: Path, moments: int = 6) -> Path:
    """Write a PNG with one row an episode: `moments` evenly spaced frames of all its cameras."""
    rows = []
    for episode in episodes:
        frames = side_by_side(episode)
        chosen = np.linspace(0, len(frames) - 1, moments).round().astype(int)
        outcome = "success" if episode.success else "failure"
        title = f"{episode.robot} {episode.task} seed {episode.seed} {outcome}: {episode.instruction}"
        rows.append(_caption(np.concatenate(list(frames[chosen]), axis=1), title))
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows]
    temporary = path.with_name(f".{path.stem}.part.png")
    Image.fromarray(np.concatenate(padded)).save(temporary)
    temporary.replace(path)
    return path


def write_rerun(episode: Episode, path: Path, fps: int = 20) -> Path:
    """Write a Rerun recording (.rrd) with pictures, states and actions. Needs the extra `blm[viewer]`."""
    try:
        import rerun as rr
    except ModuleNotFoundError as error:
        raise BlmError("Rerun is not installed; run: pip install 'blm[viewer]'") from error
    recording = rr.RecordingStream(f"{episode.robot}-{episode.task}-{episode.seed}")
    recording.save(path)
    recording.log("instruction", rr.TextDocument(episode.instruction), static=True)
    for t in range(len(episode)):
        recording.set_time("time", duration=t / fps)
        for camera, frames in episode.images.items():
            recording.log(f"camera/{camera}", rr.Image(frames[t]).compress(jpeg_quality=90))
        recording.log("state", rr.Scalars(episode.states[t]))
        recording.log("action", rr.Scalars(episode.actions[t]))
    recording.flush()
    return path


def _caption(frame: ImageArray, text: str) -> ImageArray:
    """Return the frame with a line of text below; sides are made even for the video codec."""
    height, width, _ = frame.shape
    canvas = Image.new("RGB", (width + width % 2, height + height % 2 + CAPTION))
    canvas.paste(Image.fromarray(frame), (0, 0))
    ImageDraw.Draw(canvas).text((3, canvas.height - CAPTION + 1), text, fill=(235, 235, 235))
    return np.asarray(canvas)
