"""Finds the media that rows refer to, and prepares them as their settings say.

A reference is a path, a `file://` address, a data URL, or the bytes of the file (parquet). A path is
looked for in the folder that the user names, or else in these, in this order: the source folder,
the folder of the rows' file, up to three folders above, and `images`, `image`, `videos`, `video`,
`media` and `data` in these. Published demo rows are relative to one of these. A file elsewhere is
never read.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import PIL.Image

from blm.corpora.converters.report import Tally
from blm.corpora.converters.rows import ConverterConfig, evenly_spaced
from blm.corpora.converters.turns import Medium, Turn
from blm.corpora.format.faults import RowError
from blm.corpora.format.find_media import image_size
from blm.corpora.format.writing import SourceImage
from blm.media import MAX_PIXELS, VIDEOS, load_pixels, read_frames, split_time, video_frames, video_seconds
from blm.types import BlmError, Image, ImageArray, Message

INSIDE = ("images", "image", "videos", "video", "media", "data")
"""Folders beside the rows that often hold their media."""
ABOVE = 3
"""Number of folders above the rows in which media are looked for."""
MAX_FRAMES = 10_000
"""Maximum number of frames that the settings of a video may ask for."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""File endings of pictures, which tell a list of frames from a list of videos."""


class MediaFolders:
    """The folders in which the media of one source are looked for."""

    def __init__(self, source: Path, settings: ConverterConfig, tally: Tally) -> None:
        self._source, self._settings, self._tally = source, settings, tally
        self._names: dict[str, Path] = {}

    def of_rows(self, where: str) -> list[Path]:
        """Return the folders for rows of a file, given by its place "file:number"."""
        if self._settings.media is not None:
            return [_normal(self._settings.media)]
        file = Path(where.rpartition(":")[0])
        near = [_normal(self._source if self._source.is_dir() else self._source.parent), file.parent]
        above = [folder for folder in near[0].parents[:ABOVE] if len(folder.parts) > 2]
        home = [_normal(folder) for folder in (*near, *above)]
        return list(dict.fromkeys((*home, *(folder / name for folder in home for name in INSIDE))))

    def find(self, reference: str, folders: Sequence[Path]) -> SourceImage:
        """Return the file of a reference, under the name by which the corpus stores it.

        Raises RowError for an address, a missing file and a file outside of the folders.
        """
        plain = unquote(reference.removeprefix("file://")) if reference.startswith("file:") else reference
        plain = plain.removeprefix("file:")
        if "://" in plain:
            raise RowError(
                "media outside the folder",
                f"{reference[:80]} is an address; download it, and refer to the file",
            )
        name, seconds = split_time(plain)
        inside = False
        for folder in folders:
            file = Path(os.path.normpath(folder / name))
            home = next((one for one in folders if file.is_relative_to(one)), None)
            inside = inside or home is not None
            if home is not None and file.is_file():
                stored = file.relative_to(home).as_posix()
                if self._names.setdefault(stored, file) != file:
                    other = self._names[stored]
                    raise RowError(
                        "media outside the folder", f"{file} and {other} are both '{stored}': --media"
                    )
                self._tally.note(f"media from {home}")
                fragment = "" if seconds is None else plain[len(name) :]
                return SourceImage(path=stored + fragment, file=file)
        if not inside:
            raise RowError(
                "media outside the folder", f"{reference[:80]} is not below {folders[0]}: --media FOLDER"
            )
        looked = ", ".join(map(str, folders[:3]))
        raise RowError("media missing", f"{reference[:80]} is not in {looked}{', ..' * (len(folders) > 3)}")

    def picture(self, value: Any, folders: Sequence[Path]) -> SourceImage:
        """Return a picture that is given by a reference, a data URL or a mapping with its bytes."""
        if isinstance(value, Mapping):
            if isinstance(value.get("bytes"), bytes):
                return encoded_picture(value["bytes"])
            value = value.get("path") or value.get("url")
        if isinstance(value, bytes):
            return encoded_picture(value)
        if not isinstance(value, str) or not value:
            raise RowError("malformed row", f"a picture is {str(value)[:60]!r}, it names no file")
        if value.startswith("data:"):
            return encoded_picture(_from_data_url(value))
        found = self.find(value, folders)
        if split_time(str(found.path))[1] is None:
            assert found.file is not None
            if found.file.suffix.lower() in VIDEOS:
                raise RowError("media unreadable", f"{value[:80]} is a video, not a picture")
            image_size(found.file, value)
        return found

    def message(self, turn: Turn, folders: Sequence[Path]) -> Message:
        """Return a turn with its media. Raises RowError as `images` does."""
        content: list[str | Image] = []
        for part in (turn.content,) if isinstance(turn.content, str) else turn.content:
            if isinstance(part, Medium):
                content += self.images(part, folders)
            elif part:
                content.append(part)
        return Message(turn.role, tuple(content), turn.loss)  # type: ignore[arg-type]

    def images(self, medium: Medium, folders: Sequence[Path]) -> Iterator[Image]:
        """Yield the picture of a medium, or the frames of a video, as its settings say.

        Raises RowError for missing and unreadable media, and for settings that cannot be applied.
        """
        settings = {key: value for key, value in medium.settings.items() if value is not None}
        if medium.kind == "image":
            _require_known(settings, _SIZES, "picture")
            yield self._scaled(self.picture(medium.value, folders), settings)
            return
        _require_known(settings, (*_SIZES, *_TIMES), "video")
        if isinstance(medium.value, list):
            count = int(settings.get("nframes") or settings.get("num_frames") or self._settings.frames)
            for frame in evenly_spaced(medium.value, count):
                yield self._scaled(self.picture(frame, folders), settings)
            self._tally.note("lists of frames as pictures")
            return
        yield from self._frames(medium.value, settings, folders)

    def _frames(self, value: Any, settings: Mapping[str, Any], folders: Sequence[Path]) -> Iterator[Image]:
        if not isinstance(value, str) or not value or value.startswith("data:"):
            raise RowError("malformed row", f"a video is {str(value)[:60]!r}, it names no file")
        found = self.find(value, folders)
        assert found.file is not None
        try:
            length = (video_seconds(found.file), video_frames(found.file))
            times = frame_times(*length, settings, self._settings.frames or 8)
            references = [SourceImage(path=f"{found.path}#t={time:.3f}", file=found.file) for time in times]
            if not _SCALES & settings.keys():
                yield from references
                return
            frames = read_frames(found.file, [float(f"{time:.3f}") for time in times])
        except BlmError as error:
            if isinstance(error, RowError):
                raise
            raise RowError("media unreadable", f"{found.file}: {error}") from None
        for reference, pixels in zip(references, frames, strict=True):
            scaled = self._resized(pixels, settings)
            yield reference if scaled is pixels else Image(pixels=scaled)

    def _scaled(self, picture: SourceImage, settings: Mapping[str, Any]) -> Image:
        if not _SCALES & settings.keys():
            if settings:
                self._tally.note(f"settings without an effect here: {', '.join(sorted(settings))}")
            return picture
        try:
            if picture.file is not None:
                pixels = load_pixels(Image(path=str(picture.file)), Path("/"))
            else:
                with PIL.Image.open(io.BytesIO(picture.encoded)) as opened:
                    pixels = np.asarray(opened.convert("RGB"))
        except (BlmError, OSError, ValueError) as error:
            raise RowError("media unreadable", f"{picture.path}: {error}") from None
        scaled = self._resized(pixels, settings)
        return picture if scaled is pixels else Image(pixels=scaled)

    def _resized(self, pixels: ImageArray, settings: Mapping[str, Any]) -> ImageArray:
        height, width = pixels.shape[:2]
        size = shown_size((width, height), settings)
        if size == (width, height):
            return pixels
        self._tally.note("pictures and frames scaled as their settings say")
        return np.asarray(PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BICUBIC))


_SCALES = {"min_pixels", "max_pixels", "resized_height", "resized_width"}
_SIZES = (*_SCALES, "detail")
_TIMES = ("fps", "nframes", "num_frames", "min_frames", "max_frames", "video_start", "video_end",
          "start", "end", "start_time", "end_time", "sample_fps", "raw_fps")  # fmt: skip


def _require_known(settings: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    if unknown := sorted(settings.keys() - set(known)):
        raise RowError("unsupported setting", f"{', '.join(unknown)} of a {what}")
    for key, value in settings.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key != "detail" and not (number and 0 <= value <= MAX_PIXELS):
            raise RowError("unsupported setting", f"{key} of a {what} is {value!r}")


def shown_size(size: tuple[int, int], settings: Mapping[str, Any]) -> tuple[int, int]:
    """Return the width and height [px] that the settings of a picture ask for, its shape kept.

    `resized_width` and `resized_height` give the size itself, `max_pixels` and `min_pixels` bound
    it.
    """
    width, height = size
    if "resized_width" in settings or "resized_height" in settings:
        if {"resized_width", "resized_height"} - settings.keys():
            raise RowError("unsupported setting", "resized_width and resized_height belong together")
        sides = int(settings["resized_width"]), int(settings["resized_height"])
        if min(sides) < 1 or sides[0] * sides[1] > MAX_PIXELS:
            raise RowError("unsupported setting", f"a resized picture of {sides[0]} x {sides[1]} px")
        return sides
    most, least = settings.get("max_pixels"), settings.get("min_pixels")
    area = width * height
    if most is not None and least is not None and most < least:
        raise RowError("unsupported setting", f"max_pixels {most} is below min_pixels {least}")
    if most is not None and area > most:
        scale = (most / area) ** 0.5
        return max(1, int(width * scale)), max(1, int(height * scale))
    if least is not None and area < least:
        scale = (least / area) ** 0.5
        return int(-(-width * scale // 1)), int(-(-height * scale // 1))
    return size


def frame_times(seconds: float, frames: int, settings: Mapping[str, Any], count: int) -> list[float]:
    """Return the times of the frames to take of a video [s], from the middles of equal parts.

    `count` frames are taken unless the settings give a number (`nframes`) or a rate (`fps`, within
    `min_frames` and `max_frames`), and never more than the video has there: `frames` in all. Start
    and end settings choose a part of the video.
    """

    def first(*keys: str) -> float | None:
        return next((float(settings[key]) for key in keys if key in settings), None)

    begin = first("video_start", "start", "start_time") or 0.0
    end = min(seconds, first("video_end", "end", "end_time") or seconds)
    if not begin < end:
        raise RowError(
            "unsupported setting", f"the part from {begin:g} to {end:g} s of a video of {seconds:g} s"
        )
    number, rate = first("nframes", "num_frames"), first("fps")
    if number is not None:
        count = int(number)
    elif rate is not None:
        count = max(1, round((end - begin) * rate))
        count = int(max(first("min_frames") or 1, min(count, first("max_frames") or count)))
    if not 1 <= count <= MAX_FRAMES:
        raise RowError("unsupported setting", f"{count} frames of a video")
    count = min(count, max(1, math.ceil(frames * (end - begin) / seconds)))
    return [begin + (end - begin) * (index + 0.5) / count for index in range(count)]


def encoded_picture(data: bytes) -> SourceImage:
    """Return a picture from the contents of its file. Raises RowError for what is no picture."""
    try:
        with PIL.Image.open(io.BytesIO(data)) as opened:
            ending = {"JPEG": "jpg"}.get(str(opened.format), str(opened.format).lower())
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise RowError("media unreadable", f"{len(data)} bytes are no picture: {error}") from None
    name = f"images/{hashlib.sha256(data).hexdigest()[:16]}.{ending}"
    image_size(io.BytesIO(data), name)
    return SourceImage(path=name, encoded=data)


def from_base64(text: str) -> bytes:
    """Decode base64, in which line breaks do not matter. Raises RowError."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError("media unreadable", f"base64 of a picture: {error}") from None


def _from_data_url(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RowError("media unreadable", f"a data URL begins with {head[:40]!r}, not with data:..;base64,")
    return from_base64(data)


def is_frames(values: Any) -> bool:
    """Return whether a list holds the frames of a video: pictures by their endings or contents."""
    return (
        isinstance(values, list)
        and bool(values)
        and all(
            (
                isinstance(one, str)
                and (one.startswith("data:image") or Path(split_time(one)[0]).suffix.lower() in PICTURES)
            )
            or isinstance(one, Mapping)
            for one in values
        )
    )


def _normal(folder: Path) -> Path:
    return Path(os.path.normpath(folder.absolute()))
