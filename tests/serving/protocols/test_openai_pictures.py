"""Pictures in chat requests: every kind that clients send is seen rightly; broken ones and bombs are not."""

from __future__ import annotations

import base64
import io
import struct
import time
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from PIL import ImageCms
from PIL.ExifTags import Base

from blm.serving.errors import RequestError
from blm.serving.protocols.openai.conversation import ChatLimits
from blm.serving.protocols.openai.images import decode, read_pictures
from tests.support.memory import MEGABYTE, as_uri, data_uri, memory_below

LIMITS = ChatLimits()


def seen(uri: str) -> np.ndarray:
    """What the model sees of a picture."""
    return decode(read_pictures([("picture", uri)], LIMITS.pixels, LIMITS.total_pixels)[0])


COLOURS = (
    np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [250, 250, 250]]], np.uint8).repeat(8, 0).repeat(8, 1)
)
RGB = Pillow.fromarray(COLOURS)


def test_base64_may_be_wrapped_unpadded_or_of_the_other_alphabet() -> None:
    uri = data_uri(RGB)
    head, _, coded = uri.partition(",")
    wrapped = "\n".join(coded[at : at + 76] for at in range(0, len(coded), 76)) + "\r\n"
    other = coded.replace("+", "-").replace("/", "_")
    percent = coded.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D")
    for form in (coded, wrapped, " " + coded.replace("A", "A ", 3), coded.rstrip("="), other, percent):
        assert (seen(f"{head},{form}") == COLOURS).all()
    for wrong in (
        coded + "!",
        coded[:5] + "=" + coded[5:],
        coded[: len(coded.rstrip("=")) // 4 * 4 + 1],
        "é",
    ):
        with pytest.raises(RequestError, match="not an image"):
            seen(f"{head},{wrong}")


@pytest.mark.parametrize(
    "head",
    [
        "data:image/png;base64,",
        "data:image;base64,",
        "data:image/jpg;base64,",
        "DATA:IMAGE/PNG;BASE64,",
        "data:image/png;charset=utf-8;base64,",
        "data:image/png;name=a.png;charset=utf-8;base64,",
        " data:image/svg+xml;base64,",
        "data:image/png;base64 ,\n",
    ],
)
def test_heads_of_data_uris(head: str) -> None:
    assert (seen(head + data_uri(RGB).partition(",")[2]) == COLOURS).all()


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "x",
        "data:",
        "data:,x",
        "data:image/png,x",
        "data:text/plain;base64,aaaa",
        "http://h/a.png",
        "/a.png",
    ],
)
def test_invalid_image_urls_get_a_hint(uri: str) -> None:
    with pytest.raises(RequestError, match="data:image/png;base64"):
        seen(uri)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_format_with_its_metadata(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    if form != "GIF":
        options |= {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
    got = seen(data_uri(RGB, form, **options)).astype(int)
    assert got.shape == COLOURS.shape and abs(got - COLOURS).mean() < (12 if form == "JPEG" else 1)


def test_modes_of_pictures() -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    assert (seen(data_uri(Pillow.fromarray(ramp)))[..., 0] == ramp >> 8).all(), "16 bits of grey"
    assert (seen(data_uri(Pillow.new("1", (4, 4), 1))) == 255).all()
    assert (seen(data_uri(Pillow.new("L", (4, 4), 77))) == 77).all()
    assert (seen(data_uri(Pillow.new("LA", (4, 4), (9, 0)))) == 255).all(), "transparent is white"
    assert (seen(data_uri(Pillow.new("RGBA", (4, 4), (9, 8, 7, 255)))) == (9, 8, 7)).all()
    assert (seen(data_uri(Pillow.new("RGBA", (4, 4), (0, 0, 0, 0)))) == 255).all()
    palette = Pillow.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert (seen(data_uri(palette)) == (10, 20, 30)).all()
    assert (seen(data_uri(palette, transparency=1)) == 255).all()
    assert (seen(data_uri(palette, transparency=bytes([0, 128]))) == (132, 137, 142)).all(), "half of each"
    assert (seen(data_uri(palette, "GIF", transparency=1)) == 255).all()
    assert (seen(data_uri(Pillow.new("RGB", (4, 4), (9, 8, 7)), transparency=(9, 8, 7))) == 255).all()
    cmyk = seen(data_uri(Pillow.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert abs(cmyk.astype(int) - (255, 0, 0)).max() < 30, "red"


def test_formats_that_are_not_accepted() -> None:
    for form in ("TIFF", "ICO", "PPM"):
        with pytest.raises(RequestError, match="accepted: PNG, JPEG"):
            seen(data_uri(RGB, form))


def oriented(turn: int) -> bytes:
    exif = Pillow.Exif()
    exif[Base.Orientation] = turn
    return exif.tobytes()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_are_upright_whatever_their_orientation(form: str, turn: int) -> None:
    from PIL import ImageOps

    wide = Pillow.fromarray(np.concatenate([COLOURS, COLOURS[:, :8]], 1))
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    uri = data_uri(wide, form, exif=oriented(turn), **options)
    stored = Pillow.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    upright = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    assert (seen(uri) == upright).all()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\0" * 40,
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\xff\xff\0\0\0\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x02\0\xff\xff\xff\xff\x08\0\0\0" * 5000,
        b"Exif\0\0" + b"\xff" * 60_000,
    ],
)
def test_broken_exif_is_ignored_without_a_warning(form: str, exif: bytes) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert seen(data_uri(RGB, form, exif=exif, **options)).shape == COLOURS.shape
    assert not told


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(*chunks: bytes) -> bytes:
    plain = base64.b64decode(data_uri(RGB).partition(",")[2])
    return plain[:33] + b"".join(chunks) + plain[33:]


def test_a_png_with_bombs_in_its_metadata_is_read_without_them() -> None:
    bomb = zlib.compress(bytes(80 * MEGABYTE), 9)
    chunks = (
        png_chunk(b"iCCP", b"x\0\0" + bomb),
        png_chunk(b"iCCP", b"broken"),
        png_chunk(b"zTXt", b"x\0\0" + bomb),
        png_chunk(b"iTXt", b"x\0\1\0\0\0" + bomb),
        png_chunk(b"tEXt", b"x\0" + b"a" * MEGABYTE),
        png_chunk(b"eXIf", b"II*\0" + b"\xff" * 100),
        png_chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)),
        png_chunk(b"pHYs", b"short"),
    )
    with memory_below(20 * MEGABYTE):
        assert (seen(as_uri(with_chunks(*chunks))) == COLOURS).all()
    with pytest.raises(RequestError, match="more than 10000 chunks"):
        seen(as_uri(with_chunks(png_chunk(b"tEXt", b"") * 20_000)))


def sized(form: str, width: int, height: int) -> bytes:
    """A small file that says it is large."""
    if form == "PNG":
        return b"\x89PNG\r\n\x1a\n" + png_chunk(
            b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
        )
    if form == "GIF":
        return (
            b"GIF89a"
            + struct.pack("<HHBBB", 1, 1, 0, 0, 0)
            + b","
            + struct.pack("<HHHHB", 0, 0, width, height, 0)
        )
    if form == "BMP":
        return b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, width, -height, 1, 1, 0) + bytes(24)
    if form == "VP8X":
        sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        chunk = b"VP8X" + struct.pack("<I", 10) + bytes(4) + sides
        return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk
    if form == "VP8L":
        bits = (width - 1) | (height - 1) << 14
        chunk = b"VP8L" + struct.pack("<IBI", 5, 0x2F, bits) + b"\0"
        return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk
    frame = struct.pack(">BBHBHHB", 0xFF, 0xC2, 11, 8, height, width, 1) + b"\x01\x11\0"
    return b"\xff\xd8" + frame + b"\xff\xda"


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "VP8X", "VP8L", "JPEG"])
@pytest.mark.parametrize("size", [(16383, 16383), (12_000, 8_000), (4001, 4000)])
def test_large_pictures_are_refused_by_their_header(form: str, size: tuple[int, int]) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        wrong = rf"{size[0]} x {size[1]} is more than 16000000 pixels"
        with memory_below(MEGABYTE), pytest.raises(RequestError, match=wrong):
            seen(as_uri(sized(form, *size)))
    assert not told


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "JPEG"])
@pytest.mark.parametrize("size", [(0, 9), (9, 0), (0, 0), (4000, 3), (3, 60_000)])
def test_pictures_without_area_or_like_a_line_are_refused(form: str, size: tuple[int, int]) -> None:
    if form == "GIF" and 0 in size:
        return  # the canvas of `sized` has one pixel
    with pytest.raises(RequestError, match="pixels; sides of at least 1"):
        seen(as_uri(sized(form, *size)))


def test_animations_show_their_first_frame() -> None:
    frames = [Pillow.new("RGB", (300, 300), (n, 2 * n, 0)) for n in range(40)]
    for form in ("GIF", "WEBP", "PNG"):
        uri = data_uri(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
        start = time.process_time()
        assert (seen(uri) == 0).all()
        assert time.process_time() - start < 1


def test_a_jpeg_of_many_scans_is_refused() -> None:
    uri = data_uri(RGB, "JPEG", progressive=True)
    assert seen(uri).shape == COLOURS.shape
    data = base64.b64decode(uri.partition(",")[2])
    at = data.rindex(b"\xff\xda")
    with pytest.raises(RequestError, match="more than 64 scans"):
        seen(as_uri(data[:at] + data[at:-2] * 100 + b"\xff\xd9"))


def test_cut_pictures_are_refused_wherever_they_are_cut() -> None:
    noise = Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        data = base64.b64decode(data_uri(noise, form).partition(",")[2])
        for end in range(0, int(len(data) * 0.9), max(1, len(data) // 60)):
            with pytest.raises(RequestError, match=r"not an image|sides of at least"):
                seen(as_uri(data[:end]))


FILES = [
    base64.b64decode(data_uri(RGB, form, **options).partition(",")[2])
    for form, options in (
        ("PNG", {"exif": oriented(6)}),
        ("JPEG", {"exif": oriented(3)}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {"exif": oriented(2)}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("BMP", {}),
        ("GIF", {"save_all": True, "append_images": [RGB.rotate(90)]}),
    )
]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(FILES), st.lists(st.tuples(st.floats(0, 0.999), st.binary(max_size=4)), max_size=6))
def test_altered_pictures_are_read_or_refused_and_never_warn(
    data: bytes, changes: list[tuple[float, bytes]]
) -> None:
    altered = bytearray(data)
    for place, piece in changes:
        at = int(place * len(altered))
        altered[at : at + len(piece)] = piece
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            got = seen(as_uri(bytes(altered)))
            assert got.dtype == np.uint8 and got.ndim == 3 and got.shape[2] == 3 and got.size
        except RequestError as error:
            assert error.status == 400 and error.param == "picture"
    assert not told
