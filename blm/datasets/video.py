"""Video files: encode frames, join files without re-encoding, read exact frames quickly.

The codec is H.264 with a key frame every second frame and no B-frames. Any frame is therefore at
most one decode away from a key frame, and packets of one file can be appended to another. The round
trip changes pixels by about 1 of 255 levels (crf 23).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from blm.io import DamagedError, require_no_pointer
from blm.types import BlmError, ImageArray

CODEC_OPTIONS = {"crf": "23", "g": "2", "bf": "0", "preset": "veryfast"}
"""Options of libx264: quality, key-frame interval, number of B-frames, speed."""


def encode(path: Path, frames: ImageArray, fps: int) -> None:
    """Write `frames` [T, H, W, 3] (H, W even) as an mp4 of H.264 yuv420p."""
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise BlmError(f"video frames must have even sides (yuv420p), got {width}x{height}")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=dict(CODEC_OPTIONS))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1  # same bytes on every machine, and workers fill the cores
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        container.mux(stream.encode())


def concatenate(sources: Sequence[Path], out: Path) -> None:
    """Join mp4 files that `encode` wrote with equal size and rate, by copying their packets."""
    with av.open(str(out), "w") as container:
        offset = 0
        for source in sources:
            with av.open(str(source)) as piece:
                stream = piece.streams.video[0]
                if not offset:
                    target = container.add_stream_from_template(stream)
                    header = stream.codec_context.extradata
                if stream.codec_context.extradata != header:
                    raise BlmError(f"'{source}' was encoded with other settings than '{sources[0]}'")
                for packet in piece.demux(stream):
                    if packet.pts is not None and packet.dts is not None:  # None: it flushes a stream
                        packet.pts += offset
                        packet.dts += offset
                        packet.stream = target
                        container.mux(packet)
                offset += round(stream.frames * _ticks_per_frame(stream))


class VideoHeader(NamedTuple):
    """Properties in the header of a video file."""

    frames: int
    rate: float
    """Frames per second."""
    shape: tuple[int, int]
    """Height and width [px]."""


def probe(path: Path) -> VideoHeader:
    """Read the header of a video without decoding. Raises DamagedError for an unreadable file."""
    with _video(path) as (_, stream):
        assert stream.average_rate is not None
        return VideoHeader(int(stream.frames), float(stream.average_rate), (stream.height, stream.width))


def count_frames(path: Path) -> int:
    """Return the number of frames in the file's index.

    Raises DamagedError for an unreadable file.
    """
    return probe(path).frames


def decodable_frames(path: Path) -> int:
    """Return the number of frames before the first undecodable one. Reads the whole file."""
    with _video(path) as (container, stream):
        stream.codec_context.options = {"err_detect": "explode"}  # by default, damage is concealed
        number = 0
        try:
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    break
                number += 1
        except av.FFmpegError:
            pass
        return number


def frame_times(path: Path) -> NDArray[np.float64]:
    """Return the sorted presentation times of all frames [s], without decoding.

    Raises DamagedError.
    """
    with _video(path) as (_, stream):
        assert stream.time_base is not None
        base = float(stream.time_base)
    return frame_ticks(path).astype(np.float64) * base


def frame_ticks(path: Path) -> NDArray[np.int64]:
    """Return the sorted presentation times of all frames, in the time base of the stream.

    Raises DamagedError.
    """
    with _video(path) as (container, stream):
        shown = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
        return np.sort(np.array(shown, np.int64))


@contextmanager
def _video(path: Path) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if stream.codec_context is None or not stream.average_rate or not stream.time_base:
                raise IndexError("it holds no video in a known form")
            yield container, stream
    except (av.FFmpegError, IndexError, UnicodeError) as error:
        require_no_pointer(path)
        raise DamagedError(
            f"video '{path}' cannot be read ({error}): it is missing, truncated or not a video"
        ) from error


def _ticks_per_frame(stream: av.VideoStream) -> Fraction:
    assert stream.average_rate is not None and stream.time_base is not None
    return 1 / (stream.average_rate * stream.time_base)


class VideoFile:
    """An open video of constant frame rate with random access to exact frames.

    It seeks only if a key frame lies between the present position and the requested frame.
    """

    def __init__(self, path: Path, by_order: bool = False) -> None:
        """With `by_order` frames are numbered in the order of their times, which may be uneven."""
        self._path = path
        self._times = frame_ticks(path) if by_order else None
        count_frames(path)  # raises an error that names a damaged file
        self._container = av.open(str(path))
        self._stream = self._container.streams.video[0]
        self._stream.codec_context.thread_count = 1
        self._to_rgb = VideoReformatter()  # `to_ndarray` of a frame would create one each time: 1/2 to 1 ms
        self._ticks = _ticks_per_frame(self._stream)
        self._start = self._stream.start_time or 0
        keys = [self._number(entry.timestamp) for entry in self._stream.index_entries if entry.is_keyframe]
        self._keys = keys or [0]
        self._decoded: Iterator[av.VideoFrame] = self._container.decode(self._stream)
        self._next = 0

    def read(self, index: int) -> ImageArray:
        """Return frame `index` as RGB, uint8 [H, W, 3].

        Raises DamagedError if there is no such frame.
        """
        try:
            frame = self._find(index)
        except av.FFmpegError as error:
            raise DamagedError(f"video '{self._path}': frame {index} cannot be read ({error})") from error
        if frame is None:
            raise DamagedError(f"video '{self._path}' has no frame {index}: it is cut or altered")
        return np.asarray(self._to_rgb.reformat(frame, format="rgb24").to_ndarray(), np.uint8)

    def _number(self, pts: int) -> int:
        if self._times is not None:
            return int(np.searchsorted(self._times, pts))
        return round((pts - self._start) / self._ticks)

    def _time(self, index: int) -> int:
        """Return the time at which a frame is shown, in ticks of the stream."""
        if self._times is not None:
            return int(self._times[min(index, len(self._times) - 1)])
        return self._start + round(index * self._ticks)

    def _find(self, index: int) -> av.VideoFrame | None:
        at = bisect_right(self._keys, index) - 1
        if self._keys[max(at, 0)] <= self._next <= index:
            return self._advance(index)
        # With B-frames, a frame may need an earlier key frame, since frames are stored in decoding order.
        for key in (at, at - 1):
            self._seek(self._keys[max(key, 0)])
            if (frame := self._advance(index)) is not None:
                return frame
        return None

    def _seek(self, index: int) -> None:
        self._container.seek(self._time(index), stream=self._stream)
        self._decoded = self._container.decode(self._stream)

    def _advance(self, index: int) -> av.VideoFrame | None:
        """Decode up to frame `index`; return None if the stream ends before it."""
        for frame in self._decoded:
            assert frame.pts is not None
            number = self._number(frame.pts)
            self._next = number + 1
            if number >= index:
                return frame if number == index else None
        return None
