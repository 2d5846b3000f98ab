"""Video files: encode frames, join files without re-encoding, read exact frames quickly.

H.264 with a key frame every second frame and no B-frames: any frame is at most one decode away from a key
frame, and packets of one file can follow those of another. The round trip errs by about 1 of 255 (crf 23).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np

from blm.types import BlmError, ImageArray

CODEC_OPTIONS = {"crf": "23", "g": "2", "bf": "0", "preset": "veryfast"}
LOOKAHEAD = 4
"""Reading at most this many frames ahead decodes onwards; a larger step seeks."""


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
                offset += stream.frames * _ticks_per_frame(stream)


def count_frames(path: Path) -> int:
    """Return the number of frames that the file's index lists. Raises BlmError for an unreadable file."""
    try:
        with av.open(str(path)) as container:
            return int(container.streams.video[0].frames)
    except (av.FFmpegError, IndexError) as error:
        raise BlmError(
            f"video '{path}' cannot be read ({error}): it is missing, truncated or not a video; "
            "restore the file, or delete the dataset folder and collect again"
        ) from error


def _ticks_per_frame(stream: av.VideoStream) -> int:
    assert stream.average_rate is not None and stream.time_base is not None
    return round(1 / (stream.average_rate * stream.time_base))


class VideoFile:
    """One open video with random access to exact frames; sequential reads do not seek."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._container = av.open(str(path))
        self._stream = self._container.streams.video[0]
        self._stream.codec_context.thread_count = 1
        self._ticks = _ticks_per_frame(self._stream)
        self._decoded: Iterator[av.VideoFrame] = self._container.decode(self._stream)
        self._next = 0

    def read(self, index: int) -> ImageArray:
        """Return frame `index` as [H, W, 3] RGB. Raises BlmError when the file has no such frame."""
        if not self._next <= index < self._next + LOOKAHEAD:
            self._container.seek(index * self._ticks, stream=self._stream)
            self._decoded = self._container.decode(self._stream)
        for frame in self._decoded:
            assert frame.pts is not None
            self._next = frame.pts // self._ticks + 1
            if self._next == index + 1:
                return np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
            if self._next > index:
                break
        raise BlmError(f"video '{self._path}' has no frame {index}; it is damaged: collect the dataset again")
