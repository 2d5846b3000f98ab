"""Loads images and video frames from disk; no other module opens media files.

A media reference is a path below its folder. With a media fragment (W3C Media Fragments,
`clip.mp4#t=1.25`) it is the frame of the video at 1.25 s. Files outside the folder and oversized
images are refused.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from blm.types import BlmError, Image, ImageArray, Message

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream
    from av.container import InputContainer

MAX_PIXELS = 64_000_000
"""Maximum size of an image [px]; larger ones are refused before they are decoded."""
INTRA = 1
"""FFmpeg's AV_PICTURE_TYPE_I (`av.video.frame.PictureType.I`)."""
SEEK_TRIES = 4
"""Maximum number of key frames to try per seek.

Decoding times are at most a few frames before display times.
"""
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
    """Return the messages with every image loaded.

    Paths are kept, because they identify the frames of one video.
    """
    images = [part for message in messages for part in message.images]
    loaded = iter(load_images(images, root))
    return tuple(
        replace(m, content=tuple(p if isinstance(p, str) else Image(next(loaded), p.path) for p in m.content))
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
            require_8_bits(picture, str(file))
            return np.asarray(PIL.ImageOps.exif_transpose(picture).convert("RGB"))
    except BlmError:
        raise
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise BlmError(f"cannot read image {file}: {error}") from error


def require_8_bits(picture: PIL.Image.Image, name: str) -> None:
    """Raise BlmError for a picture of one channel with more than 8 bits.

    Such a picture is usually a depth map. Only its author knows which range is to be seen; the
    decoder would make all values above 255 white.
    """
    if picture.mode[0] in "IF":
        raise BlmError(
            f"image {name} has 16 or more bits in one channel (mode {picture.mode}), as depth maps have; "
            "store it with 8 bits, scaled as it is to be seen"
        )


def load_images(images: Sequence[Image], root: Path | None = None) -> list[ImageArray]:
    """Return the pixels of images, in order, as `load_pixels` does.

    Each video is opened once for all of its frames.
    """
    clips: dict[str, list[int]] = {}
    for index, image in enumerate(images):
        if image.pixels is None and image.path is not None and split_time(image.path)[1] is not None:
            clips.setdefault(split_time(image.path)[0], []).append(index)
    loaded: dict[int, ImageArray] = {}
    for name, indices in clips.items():
        if len(indices) > 1 and root is not None:
            times = [split_time(str(images[index].path))[1] or 0.0 for index in indices]
            loaded |= zip(indices, read_frames(locate(name, root), times), strict=True)
    return [
        loaded[index] if index in loaded else load_pixels(image, root) for index, image in enumerate(images)
    ]


def read_frames(file: Path, times: Sequence[float]) -> list[ImageArray]:
    """Return the frames of a video that are shown at `times`, in that order.

    Times are in seconds from the start of the video stream, in any order. A time before the first
    frame gives the first frame, and a time after the end gives the last one. The file is opened
    once and read by seeking to key frames. If a seek cannot be verified to give the frames of a
    full decode (`_Video`), the video is decoded once from its start. Raises BlmError for a file
    that is not a readable video.
    """
    import av

    if not times:
        return []
    try:
        keys = _key_times(file)
        try:
            return _frames_at(file, times, keys)
        except (_UnprovenSeekError, av.FFmpegError):
            if not keys:
                raise
            return _frames_at(file, times, ())
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:
        if isinstance(error, BlmError):
            raise
        raise BlmError(f"cannot read video {file}: {error}") from error


def _frames_at(file: Path, times: Sequence[float], keys: Sequence[float]) -> list[ImageArray]:
    import av

    picked: dict[float, ImageArray] = {}
    before: VideoFrame | None = None
    with av.open(str(file)) as container:
        _require_size(file, container.streams.video[0])
        video = _Video(container, keys)
        for seconds in sorted(set(times)):
            frame = video.frame_at(seconds)
            if frame is None:
                raise BlmError(f"cannot read video {file}: it has no frames")
            if frame is not before:
                _require_size(file, frame)
                pixels = np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
            picked[seconds], before = pixels, frame
    return [picked[seconds] for seconds in times]


def _require_size(file: Path, picture: VideoStream | VideoFrame) -> None:
    if picture.width * picture.height > MAX_PIXELS:
        raise BlmError(f"video {file} has {picture.width} x {picture.height} px; too large")


def _key_times(file: Path) -> tuple[float, ...]:
    """Return the times of the key frames in the file's index [s]; empty without such an index.

    They show where a seek saves work, but prove nothing: an index may be incomplete. MP4 lists
    decoding times, which precede display times; all are shifted by the distance of the first one
    from the start.
    """
    import av

    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        if len(stream.index_entries) <= 1 and container.duration:
            with suppress(av.FFmpegError):  # Matroska reads its index (cues) at the first seek
                container.seek(container.duration)
        keys = [entry for entry in stream.index_entries if entry.is_keyframe]
        places = [entry.pos for entry in keys]
        if stream.time_base is None or places != sorted(places):  # times that start again inside the file
            return ()
        ticks = sorted(entry.timestamp - (stream.start_time or 0) for entry in keys)
        shift = max(0, -ticks[0]) if ticks else 0
        return tuple(float((tick + shift) * stream.time_base) for tick in ticks)


class _UnprovenSeekError(Exception):
    """No seek could be checked to give the frames of a full decode."""


class _Video:
    """An open video that finds frames by time, for times that never decrease.

    The frame shown at a time is the last one before the first frame that is shown later, in the order
    in which a full pass decodes them. A seek gives the same frames if decoding starts at a key frame
    that is shown no later than the wanted time, is an intra picture, and is the first frame that the
    decoder returns. Frames shown before that key frame may lack their references (open GOP) and are
    dropped. From there on, timestamps must exist and never decrease. A seek that lands too late is
    repeated with an earlier key frame; every other failed check raises `_UnprovenSeekError`. The
    checks cannot see an intra picture that is marked as a key frame although later frames refer to
    frames before it; a correct encoder writes no such stream.
    """

    def __init__(self, container: InputContainer, keys: Sequence[float]) -> None:
        self._container, self._keys = container, keys
        self._stream = container.streams.video[0]
        self._start = self._stream.start_time or 0
        self._frames: Iterator[VideoFrame] = container.decode(self._stream)
        self._shown: VideoFrame | None = None
        self._following = next(self._frames, None)

    def frame_at(self, seconds: float) -> VideoFrame | None:
        """Return the frame shown at a time; None for a video without frames."""
        last_key = bisect_right(self._keys, seconds) - 1
        if (
            self._following is not None
            and last_key >= 0
            and self._keys[last_key] > self._time(self._following)
        ):
            self._seek(last_key, seconds)
        while self._following is not None and (self._shown is None or self._time(self._following) <= seconds):
            self._shown, self._following = self._following, next(self._frames, None)
        return self._shown

    def _time(self, stamped: VideoFrame | Packet) -> float:
        """When a frame is shown [s]; a frame without a timestamp counts as shown at the start."""
        if stamped.pts is None or self._stream.time_base is None:
            return 0.0
        return float((stamped.pts - self._start) * self._stream.time_base)

    def _seek(self, key: int, seconds: float) -> None:
        earlier = self._keys[max(key - SEEK_TRIES, 0) : key][::-1]
        for target in (seconds, *earlier):
            assert self._stream.time_base is not None
            ticks = self._start + floor(target / self._stream.time_base)
            self._container.seek(ticks, stream=self._stream)
            packets = self._container.demux(self._stream)
            first = next(packets)
            if first.pts is None or not first.is_keyframe or self._time(first) > seconds:
                continue
            self._frames = self._frames_from(first, packets)
            opening = next(self._frames, None)
            if opening is None or opening.pts != first.pts or opening.pict_type != INTRA:
                break
            self._shown, self._following = opening, next(self._frames, None)
            return
        raise _UnprovenSeekError

    @staticmethod
    def _frames_from(first: Packet, packets: Iterator[Packet]) -> Iterator[VideoFrame]:
        """Yield the frames from the key frame of the packet `first` on."""
        opening = last = first.pts or 0
        for packet in chain([first], packets):
            for frame in packet.decode():
                if frame.pts is None or opening <= frame.pts < last:
                    raise _UnprovenSeekError
                if frame.pts >= opening:
                    last = frame.pts
                    yield frame


@contextmanager
def _opened_video(file: Path) -> Iterator[tuple[Any, Any]]:
    """Open a video: its container and its first stream of pictures. Raises BlmError for a file that is
    not a readable video."""
    import av

    try:
        with av.open(str(file)) as container:
            yield container, container.streams.video[0]
    except (av.FFmpegError, OSError, IndexError) as error:
        raise BlmError(f"cannot read video {file}: {error}") from error


@lru_cache(4096)
def video_seconds(file: Path) -> float:
    """Return the length of a video [s]. Raises BlmError for a file that is not a readable video."""
    import av

    with _opened_video(file) as (container, stream):
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        seconds = float(container.duration or 0) / av.time_base
        if "matroska" in container.format.name and stream.start_time and stream.time_base:
            seconds -= float(stream.start_time * stream.time_base)  # its header counts from 0 s
        return seconds


def video_size(file: Path) -> tuple[int, int]:
    """Return height and width of a video [px] from its header.

    Raises BlmError for a file that is not a readable video.
    """
    with _opened_video(file) as (_, stream):
        return stream.height, stream.width


@lru_cache(4096)
def video_frames(file: Path) -> int:
    """Return the number of frames of a video: that of its header, else of its packets.

    Raises BlmError for a file that is not a readable video.
    """
    with _opened_video(file) as (container, stream):
        return stream.frames or sum(packet.size > 0 for packet in container.demux(stream))


def frame_references(path: str, root: Path, count: int) -> list[str]:
    """Return references to `count` frames of a video, from the middles of equal parts of it; to
    each of its frames if it has fewer."""
    file = locate(path, root)
    seconds, count = video_seconds(file), max(1, min(count, video_frames(file)))
    return [f"{path}#t={seconds * (index + 0.5) / count:.3f}" for index in range(count)]
