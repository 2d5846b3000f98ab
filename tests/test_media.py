"""Frames of videos by time: what seeking finds is what one pass over the whole video finds."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blm import media
from blm.media import frame_references, load_images, load_pixels, read_frames, video_seconds, with_pixels
from blm.types import BlmError, Image, ImageArray, Message

SIDE = 32
RATE = 20


def write_clip(
    path: Path,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    *,
    count: int = 60,
    ticks: Sequence[int] | None = None,
    seed: int = 0,
) -> Path:
    """Encode a moving, noisy picture; `ticks` are the display times of the frames [ms]."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 60, (SIDE, 4 * SIDE, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options or {})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        if ticks is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count if ticks is None else len(ticks)):
            picture = noise[:, number % (3 * SIDE) :][:, :SIDE] + np.uint8(number * 3 % 180)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
            if ticks is not None:
                frame.pts, frame.time_base = ticks[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def full_decode(path: Path) -> list[tuple[float, ImageArray]]:
    """Every frame with its time from the start of the stream [s]; no timestamp: 0 s."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        start = stream.start_time or 0
        return [
            (
                0.0 if frame.pts is None else float((frame.pts - start) * stream.time_base),
                frame.to_ndarray(format="rgb24"),
            )
            for frame in container.decode(stream)
        ]


def expected(frames: Sequence[tuple[float, ImageArray]], seconds: float) -> ImageArray:
    """The last frame before the first one that is shown later than `seconds`."""
    for (_, pixels), (following, _) in pairwise(frames):
        if following > seconds:
            return pixels
    return frames[-1][1]


def wanted(frames: Sequence[tuple[float, ImageArray]]) -> list[float]:
    """Times on, between, before and beyond the frames; unsorted, some twice."""
    rng = np.random.default_rng(1)
    shown = [time for time, _ in frames]
    exact = [shown[int(index)] for index in rng.integers(0, len(shown), 4)]
    between = rng.uniform(0, shown[-1] + 0.1, 8).tolist()
    times = [*exact, *between, 0.0, 1e6, shown[-1], exact[0], between[0]]
    rng.shuffle(times)
    return times


def same_as_full_decode(path: Path, times: Sequence[float] | None = None) -> None:
    frames = full_decode(path)
    times = wanted(frames) if times is None else times
    for seconds, pixels in zip(times, read_frames(path, times), strict=True):
        np.testing.assert_array_equal(
            pixels, expected(frames, seconds), err_msg=f"{path.name} at {seconds} s"
        )


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How videos were read: 'seek' for each seek that passed its checks, 'once' for each full pass."""
    seen = list[str]()
    seek, frames_at = media._Video._seek, media._frames_at

    def noted_seek(self: media._Video, key: int, seconds: float) -> None:
        seek(self, key, seconds)
        seen.append("seek")

    def noted_frames_at(file: Path, times: Sequence[float], keys: Sequence[float]) -> list[ImageArray]:
        if not keys:
            seen.append("once")
        return frames_at(file, times, keys)

    monkeypatch.setattr(media._Video, "_seek", noted_seek)
    monkeypatch.setattr(media, "_frames_at", noted_frames_at)
    return seen


VARIABLE = [0, 40, 50, 130, 400, 410, 900, 1000, 1500, 1501, 1600, 2400, 2500, 2600, 2640, 3000, 3500, 3600]
CLIPS = {
    "no B-frames": ("mp4", "libx264", {"g": "8", "bf": "0"}, None),
    "B-frames": ("mp4", "libx264", {"g": "12", "bf": "3"}, None),
    "B-frames, mkv": ("mkv", "libx264", {"g": "12", "bf": "3"}, None),
    "long GOP": ("mp4", "libx264", {"g": "40", "bf": "2", "sc_threshold": "0"}, None),
    "open GOP": ("mp4", "libx264", {"x264-params": "keyint=10:open-gop=1:bframes=3:scenecut=0"}, None),
    "key frames only": ("mp4", "libx264", {"g": "1"}, None),
    "as our datasets": ("mp4", "libx264", {"crf": "23", "g": "2", "bf": "0", "preset": "veryfast"}, None),
    "mpeg4": ("mp4", "mpeg4", {"g": "10"}, None),
    "mpeg4, B-frames": ("mov", "mpeg4", {"g": "10", "bf": "2"}, None),
    "mpeg2, open GOP": ("mkv", "mpeg2video", {"g": "12", "bf": "2"}, None),
    "hevc": ("mp4", "libx265", {"x265-params": "keyint=10:bframes=3:log-level=none"}, None),
    "hevc, open GOP": (
        "mkv",
        "libx265",
        {"x265-params": "keyint=10:open-gop=1:bframes=3:log-level=none"},
        None,
    ),
    "vp9": ("webm", "libvpx-vp9", {"g": "10", "deadline": "realtime", "cpu-used": "8"}, None),
    "vp9, hidden frames": ("webm", "libvpx-vp9", {"g": "20", "auto-alt-ref": "1", "cpu-used": "8"}, None),
    "av1": ("mp4", "libsvtav1", {"g": "10", "preset": "12", "svtav1-params": "enable-overlays=0"}, None),
    "avi": ("avi", "mpeg4", {"g": "10"}, None),
    "variable rate": ("mp4", "libx264", {"g": "4", "bf": "2"}, VARIABLE),
    "variable rate, mkv": ("mkv", "libx264", {"g": "4", "bf": "2"}, VARIABLE),
    "starts at 5 s": ("mkv", "libx264", {"g": "4", "bf": "2"}, [5000 + time for time in VARIABLE]),
    "starts at 5 s, mp4": ("mp4", "libx264", {"g": "4", "bf": "0"}, [5000 + time for time in VARIABLE]),
}


@pytest.mark.parametrize("name", CLIPS)
def test_seeking_gives_the_frames_of_a_full_decode(name: str, tmp_path: Path, passes: list[str]) -> None:
    suffix, codec, options, ticks = CLIPS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV was built without {codec}")
    same_as_full_decode(write_clip(tmp_path / f"clip.{suffix}", codec, options, ticks=ticks))
    assert "seek" in passes and "once" not in passes


def test_one_key_frame_is_decoded_once(tmp_path: Path, passes: list[str]) -> None:
    path = write_clip(tmp_path / "clip.mp4", options={"g": "600", "bf": "2", "sc_threshold": "0"})
    same_as_full_decode(path)
    assert passes == []  # neither a seek nor a second pass


@pytest.mark.parametrize("suffix", ["ts", "avi", "flv"])
def test_streams_with_a_poor_index_or_timestamps_give_the_same_frames(suffix: str, tmp_path: Path) -> None:
    """MPEG-TS and FLV have no index; AVI with B-frames has no display times."""
    codec, options = (
        ("mpeg4", {"g": "10", "bf": "2"}) if suffix == "avi" else ("libx264", {"g": "10", "bf": "2"})
    )
    same_as_full_decode(write_clip(tmp_path / f"clip.{suffix}", codec, options))


def test_a_stream_without_timestamps_gives_the_frames_of_a_full_decode(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.h264", options={"g": "10", "bf": "0"})
    frames = full_decode(path)
    times = [0.0, 0.5, 100.0]
    for seconds, pixels in zip(times, read_frames(path, times), strict=True):
        np.testing.assert_array_equal(pixels, expected(frames, seconds))


def test_a_refreshed_stream_has_key_frames_that_are_no_pictures_and_is_read_once(
    tmp_path: Path, passes: list[str]
) -> None:
    """Periodic intra refresh marks P pictures as key frames; decoding from one gives damaged pictures."""
    options = {"x264-params": "keyint=20:intra-refresh=1:bframes=0:scenecut=0"}
    path = write_clip(tmp_path / "clip.mp4", options=options, count=100)
    same_as_full_decode(path)
    assert "once" in passes


def test_false_key_frames_of_the_index_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "clip.mp4", options={"g": "20", "bf": "2", "sc_threshold": "0"})
    monkeypatch.setattr(media, "_key_times", lambda file: tuple(number / 100 for number in range(300)))
    same_as_full_decode(path)


def test_a_seek_that_fails_is_replaced_by_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[str]
) -> None:
    path = write_clip(tmp_path / "clip.mp4", options={"g": "8"})

    def refuse(self: media._Video, key: int, seconds: float) -> None:
        raise av.FFmpegError(1, "Operation not permitted")

    monkeypatch.setattr(media._Video, "_seek", refuse)
    same_as_full_decode(path)
    assert passes == ["once"]


def test_a_cut_without_encoding_starts_at_its_edit(tmp_path: Path) -> None:
    """`ffmpeg -ss .. -c copy` writes an edit list that hides the frames before the cut."""
    source = write_clip(tmp_path / "source.mp4", options={"g": "10", "bf": "2"})
    path = tmp_path / "clip.mp4"
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        target = new.add_stream_from_template(stream)
        assert stream.time_base is not None
        shift = round(0.33 / float(stream.time_base))
        for packet in old.demux(stream):
            if packet.dts is not None and packet.pts is not None:
                packet.pts -= shift
                packet.dts -= shift
                packet.stream = target
                new.mux(packet)
    same_as_full_decode(path)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(data=st.data())
def test_random_clips_and_times(data: st.DataObject, tmp_path: Path) -> None:
    codec, suffixes = data.draw(
        st.sampled_from(
            [
                (codec, suffixes)
                for codec, suffixes in {
                    "libx264": ["mp4", "mkv", "mov"],
                    "mpeg4": ["mp4", "mkv", "avi"],
                    "libvpx-vp9": ["webm", "mkv", "mp4"],
                    "libsvtav1": ["mp4", "mkv"],
                }.items()
                if codec in av.codecs_available
            ]
        )
    )
    options = {"g": str(data.draw(st.integers(1, 40)))}
    if codec in ("libx264", "mpeg4"):
        options["bf"] = str(data.draw(st.integers(0, 3)))
    if codec == "libvpx-vp9":
        options |= {"deadline": "realtime", "cpu-used": "8"}
    if codec == "libsvtav1":
        options["preset"] = "12"
    suffix = data.draw(st.sampled_from(suffixes))
    count = data.draw(st.integers(1, 50))
    ticks = None
    if suffix != "avi" and data.draw(st.booleans()):
        steps = data.draw(st.lists(st.integers(20, 400), min_size=count, max_size=count))
        ticks = (np.cumsum(steps) - steps[0] + data.draw(st.sampled_from([0, 0, 700, 4000]))).tolist()
    path = write_clip(tmp_path / f"clip.{suffix}", codec, options, count=count, ticks=ticks)
    length = full_decode(path)[-1][0]
    times = data.draw(st.lists(st.floats(0, length * 1.1 + 0.1), min_size=1, max_size=10))
    same_as_full_decode(path, times)


def test_times_of_a_reference_count_from_the_start_of_the_video(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mkv", ticks=[5000 + 50 * number for number in range(40)])
    frames = full_decode(path)
    assert frames[0][0] == 0.0
    assert video_seconds(path) == pytest.approx(2.0, abs=0.06)
    references = frame_references("clip.mkv", tmp_path, 4)
    found = load_images([Image(path=reference) for reference in references], tmp_path)
    for reference, pixels in zip(references, found, strict=True):
        np.testing.assert_array_equal(pixels, expected(frames, float(reference.split("=")[1])))


def test_the_frames_of_a_clip_share_one_open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(tmp_path / "clip.mp4", options={"g": "8"})
    write_clip(tmp_path / "other.mp4", options={"g": "8"}, seed=1)
    images = [
        Image(path="clip.mp4#t=1.0"),
        Image(path="other.mp4#t=0.4"),
        Image(np.zeros((4, 4, 3), np.uint8)),
        Image(path="clip.mp4#t=2.0"),
        Image(path="clip.mp4#t=0.5"),
    ]
    alone = [load_pixels(image, tmp_path) for image in images]
    calls = list[int]()
    read = media.read_frames
    monkeypatch.setattr(
        media, "read_frames", lambda file, times: calls.append(len(times)) or read(file, times)
    )
    message = with_pixels([Message("user", (*images, "What is it?"))], tmp_path)[0]
    for image, pixels in zip(message.images, alone, strict=True):
        np.testing.assert_array_equal(image.pixels, pixels)
    assert calls == [3, 1]
    assert [image.path for image in message.images] == [image.path for image in images]


def test_bad_videos_are_named(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"no video")
    with pytest.raises(BlmError, match=r"cannot read video .*clip\.mp4"):
        read_frames(path, [0.0])
    whole = write_clip(tmp_path / "whole.mp4")
    assert read_frames(whole, []) == []
    path.write_bytes(whole.read_bytes()[:700])
    with pytest.raises(BlmError, match=r"cannot read video .*clip\.mp4"):
        read_frames(path, [0.0])
