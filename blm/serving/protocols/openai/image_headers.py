"""Read the size and orientation of an image from its headers, before anything is decoded.

Metadata (EXIF, XMP, ICC profiles, comments, texts, further frames of an APNG) is removed before
decoding: it does not change the pixels, and decoders spend memory on it, warn about it or refuse
the image because of it. Only the orientation is read.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MAX_CHUNKS = 10_000
"""Maximum number of chunks or segments of a file; encoders write one per 8 kB or more."""
MAX_SCANS = 64
"""Maximum number of scans of a progressive JPEG; encoders write about 10.

Each covers the whole image, so thousands in a small file would take minutes.
"""
MAX_EXIF_ENTRIES = 200
"""Maximum number of entries of an EXIF directory that are searched for the orientation."""
_ORIENTATION = 0x0112
_PNG_DECODED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Start-of-frame markers (ITU T.81, table B.1): all of 0xC0 .. 0xCF but DHT, JPG and DAC."""
_JPEG_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))
"""Markers without a length: TEM, RST0-7 and SOI."""


class PictureError(ValueError):
    """The bytes are not an image of a supported format; the message gives the reason."""


@dataclass(frozen=True)
class PictureHeader:
    format: str
    """Name of the format in Pillow."""
    width: int
    """Width [px] as stored, before the orientation is applied."""
    height: int
    orientation: int
    """1 .. 8, as in EXIF; 1: upright."""
    data: bytes
    """The file without metadata."""


def read_header(data: bytes) -> PictureHeader:
    """Read the header of a PNG, JPEG, WEBP, GIF or BMP file. Raises PictureError."""
    for signature, read in _READERS.items():
        if data.startswith(signature):
            try:
                return read(data)
            except (struct.error, IndexError) as error:
                raise PictureError("it ends before its size") from error
    raise PictureError(f"its first bytes are {data[:8].hex(' ') or 'missing'}")


def orientation_of(exif: bytes) -> int:
    """Return the orientation in a TIFF block; 1 if it has none or is broken."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(min(count, MAX_EXIF_ENTRIES)):
            tag, kind, many, value = struct.unpack_from(order + "HHIH", exif, start + 2 + 12 * entry)
            if tag == _ORIENTATION:
                return value if (kind, many) == (3, 1) and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _png(data: bytes) -> PictureHeader:
    width, height = struct.unpack_from(">II", data, 16)
    kept, orientation = [data[:8]], 1
    for kind, start, end in _png_chunks(data):
        if kind in _PNG_DECODED:
            kept.append(data[start:end])
        elif kind == b"eXIf":
            orientation = orientation_of(data[start + 8 : end - 4])
    return PictureHeader("PNG", width, height, orientation, b"".join(kept))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, start and end of each chunk; the last one may be truncated."""
    start = 8
    for _ in range(MAX_CHUNKS):
        if start + 8 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, start)
        yield kind, start, start + 12 + length
        start += 12 + length
    raise PictureError(f"it has more than {MAX_CHUNKS} chunks")


def _jpeg(data: bytes) -> PictureHeader:
    kept, orientation, size, at = [data[:2]], 1, None, 2
    for _ in range(MAX_CHUNKS):
        marker, end = data[at + 1], at + 2
        if data[at] != 0xFF:
            raise PictureError("its segments are broken")
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in (0xDA, 0xD9):
            break
        if marker not in _JPEG_ALONE:
            end += struct.unpack_from(">H", data, end)[0]
        if marker in _JPEG_SIZES:
            size = struct.unpack_from(">HH", data, at + 5)
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = orientation_of(data[at + 4 : end])
        # JFIF (0xE0) and Adobe (0xEE) segments are kept: they define the colour encoding
        if not (0xE1 <= marker <= 0xED or marker in (0xEF, 0xFE)):
            kept.append(data[at:end])
        at = end
    if size is None:
        raise PictureError("its size does not come before its pixels")
    if data.count(b"\xff\xda", at) > MAX_SCANS:
        raise PictureError(f"it has more than {MAX_SCANS} scans")
    return PictureHeader("JPEG", size[1], size[0], orientation, b"".join([*kept, data[at:]]))


def _webp(data: bytes) -> PictureHeader:
    """Read a WEBP file: RFC 9649, sections 2.7 and 3.4, and RFC 6386, section 9.1."""
    kind = data[12:16] if data[8:12] == b"WEBP" else b""
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        raise PictureError("it is not a WEBP image")
    orientation, at = 1, 12
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            return PictureHeader("WEBP", width, height, orientation, data)
        name, length = struct.unpack_from("<4sI", data, at)
        if name == b"EXIF":
            orientation = orientation_of(data[at + 8 : at + 8 + length])
        at += 8 + length + length % 2
    raise PictureError(f"it has more than {MAX_CHUNKS} chunks")


def _gif(data: bytes) -> PictureHeader:
    """GIF89a, sections 18 to 20: the canvas grows to the first frame, which may be larger."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at, in_extension = 13 + (3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0), False
    for _ in range(MAX_CHUNKS):
        first = data[at]
        if in_extension:  # sub-blocks that begin with their length, up to an empty one
            at, in_extension = at + 1 + first, first > 0
        elif first == 0x21:
            at, in_extension = at + 2, True
        elif first == 0x2C:
            left, top, wide, high = struct.unpack_from("<HHHH", data, at + 1)
            return PictureHeader("GIF", max(width, left + wide), max(height, top + high), 1, data)
        else:
            break
    raise PictureError("no frame was found in it")


def _bmp(data: bytes) -> PictureHeader:
    (header,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if header == 12 else "<ii", data, 18)
    return PictureHeader("BMP", abs(width), abs(height), 1, data)


_READERS: dict[bytes, Callable[[bytes], PictureHeader]] = {
    b"\x89PNG\r\n\x1a\n": _png,
    b"\xff\xd8\xff": _jpeg,
    b"RIFF": _webp,
    b"GIF8": _gif,
    b"BM": _bmp,
}
