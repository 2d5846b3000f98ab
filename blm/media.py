"""Loads images and video frames from disk; no other module opens media files.

A media reference is a path below its folder. With a media fragment (W3C Media Fragments,
`clip.mp4#t=1.25`) it is the frame of the video at 1.25 s. Files outside the folder and oversized
images are refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

from blm.types import BlmError, Image, ImageArray, Message

MAX_PIXELS = 64_000_000
"""Maximum size of an image [px]; larger ones are refused before they are decoded."""
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi")
"""File endings of videos."""
_TIME = re.compile(r"^(?P<file>.*)#t=(?P<seconds>\d+(?:\.\d+)?)$")


def load_pixels(image: Image, root: Path | None = None) -> ImageArray:
    """Return uint8 RGB [height, width, 3]; a path is read below `root`.

    Raises BlmError for any other value.
    """
    if image.pixels is None:
        if image.path is None:
            raise BlmError("an image has neither pixels nor a path")
        if root is None:
            raise BlmError(f"image '{image.path}' is a path; name the corpus folder that it is relative to")
        return _read(str(locate(image.path, root)), image.path)
    pixels = np.asarray(image.pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise BlmError(f"an image is {pixels.dtype} {pixels.shape}; needed: uint8 (height, width, 3), RGB")
    return pixels


def with_pixels(messages: Sequence[Message], root: Path) -> tuple[Message, ...]:
    """Return the messages with every image loaded."""
    return tuple(
        Message(m.role, tuple(p if isinstance(p, str) else Image(load_pixels(p, root)) for p in m.content))
        for m in messages
    )


def locate(reference: str, root: Path) -> Path:
    """Return the file of a media reference. Raises BlmError for one that leads out of `root`."""
    name = split_time(reference)[0]
    path = Path(os.path.normpath(root / name))  # not resolve(): the user may link media into the folder
    if "://" in name or name.startswith("data:") or not path.is_relative_to(os.path.normpath(root)):
        raise BlmError(f"image '{reference[:80]}' is outside its folder '{root}'; give a path below it")
    return path


def split_time(reference: str) -> tuple[str, float | None]:
    """Split 'clip.mp4#t=1.25' into file and seconds; seconds are None for an image."""
    found = _TIME.match(reference)
    return (found["file"], float(found["seconds"])) if found else (reference, None)


def _read(file: str, reference: str) -> ImageArray:
    seconds = split_time(reference)[1]
    if seconds is not None:
        return read_frames(Path(file), [seconds])[0]
    if Path(file).suffix.lower() in VIDEOS:
        raise BlmError(f"'{reference}' is a video; name one frame of it: '{reference}#t=SECONDS'")
    return read_pixels(Path(file))


def read_pixels(file: Path) -> ImageArray:
    """Read any image file as upright RGB; transparency is dropped.

    Raises BlmError naming the file.
    """
    try:
        with PIL.Image.open(file) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                size = f"{picture.width} x {picture.height} px"
                raise BlmError(f"image {file} has {size}; at most {MAX_PIXELS:,} px are read")
            return np.asarray(PIL.ImageOps.exif_transpose(picture).convert("RGB"))
    except BlmError:
        raise
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise BlmError(f"cannot read image {file}: {error}") from error


def read_frames(file: Path, times: Sequence[float]) -> list[ImageArray]:
    """Return the frames of a video at `times` [s], in that order, in one pass.

    A time after the end gives the last frame. Raises BlmError for a file that is not a readable
    video.
    """
    order = sorted(range(len(times)), key=times.__getitem__)
    picked: dict[int, ImageArray] = {}
    last: ImageArray | None = None
    for shown, frame in _frames(file):
        while order and times[order[0]] < shown and last is not None:
            picked[order.pop(0)] = last
        if not order:
            break
        last = frame
    if last is None:
        raise BlmError(f"cannot read video {file}: it has no frames")
    picked |= dict.fromkeys(order, last)
    return [picked[index] for index in range(len(times))]


def _frames(file: Path) -> Iterator[tuple[float, ImageArray]]:
    import av

    try:
        with av.open(str(file)) as container:
            for frame in container.decode(video=0):
                if frame.width * frame.height > MAX_PIXELS:
                    raise BlmError(f"video {file} has {frame.width} x {frame.height} px; too large")
                yield float(frame.time or 0.0), np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:
        if isinstance(error, BlmError):
            raise
        raise BlmError(f"cannot read video {file}: {error}") from error


@lru_cache(4096)
def video_seconds(file: Path) -> float:
    """Return the length of a video [s]. Raises BlmError for a file that is not a readable video."""
    import av

    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            if stream.duration is not None and stream.time_base is not None:
                return float(stream.duration * stream.time_base)
            return float(container.duration or 0) / av.time_base
    except (av.FFmpegError, OSError, IndexError) as error:
        raise BlmError(f"cannot read video {file}: {error}") from error


def frame_references(path: str, root: Path, count: int) -> list[str]:
    """Return references to `count` frames of a video, from the middles of equal parts of it."""
    seconds = video_seconds(locate(path, root))
    return [f"{path}#t={seconds * (index + 0.5) / count:.3f}" for index in range(count)]
