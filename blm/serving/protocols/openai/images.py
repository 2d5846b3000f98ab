"""Images in requests: data URI -> upright RGB pixels. Size limits are checked before decoding."""

from __future__ import annotations

import binascii
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image as Pillow

from blm.serving.errors import QUOTED_CHARACTERS, RequestError, quoted
from blm.serving.protocols.openai.image_headers import PictureError, PictureHeader, read_header
from blm.types import ImageArray, shorten

FORMATS = "PNG, JPEG, WEBP, GIF (its first frame) and BMP"
MAX_ASPECT = 200
"""Maximum ratio of the longer to the shorter side, as in Qwen-VL's image processors."""
BYTES_PER_PIXEL = 3
DECODING_BYTES_PER_PIXEL = 12
"""Peak memory of decoding: RGBA (4), alpha (1), Pillow's RGB (4), array (3)."""
_HEAD = re.compile(r"\s*data:image(?:/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]*)*;base64\s*", re.IGNORECASE)
_HEAD_CHARACTERS = 200
_PERCENT_CODES = {"%2B": "+", "%2F": "/", "%3D": "=", "%0A": "", "%0D": "", "%20": ""}
"""Characters of base64 that may be percent-encoded in a URI, RFC 3986."""
_ONE_ALPHABET = bytes.maketrans(b"-_", b"+/")
_TRANSPOSE = {
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_270,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_90,
}
"""EXIF orientation -> the operation that makes the image upright (EXIF 2.32, table 6)."""


@dataclass(frozen=True)
class EncodedPicture:
    """An image whose size is known but which is not decoded yet."""

    where: str
    """Path of the image in the request, for error messages."""
    header: PictureHeader

    @property
    def pixels(self) -> int:
        return self.header.width * self.header.height


def read_pictures(uris: Sequence[tuple[str, str]], most: int, most_total: int) -> list[EncodedPicture]:
    """Read the headers of images given as (path, data URI) pairs; nothing is decoded.

    Raises RequestError for data that is not an image, for more than `most` pixels in one image, and
    for more than `most_total` pixels in all images.
    """
    pictures, total = list[EncodedPicture](), 0
    for where, uri in uris:
        picture = EncodedPicture(where, _header(uri, where))
        _check_size(picture.header.width, picture.header.height, where, most)
        total += picture.pixels
        if total > most_total:
            raise RequestError(
                400,
                f"{where}: the images up to here have {total} pixels; at most {most_total} together",
                where,
            )
        pictures.append(picture)
    return pictures


def decode(picture: EncodedPicture) -> ImageArray:
    """Return uint8 RGB [height, width, 3], upright, on a white background.

    Raises RequestError. The image keeps its size, because the model's image processor resizes it as
    in training.
    """
    header = picture.header
    try:
        with Pillow.open(io.BytesIO(header.data), formats=(header.format,)) as image:
            if image.width * image.height > picture.pixels:
                raise PictureError("its headers contain different sizes")
            image.load()
            return np.asarray(_upright(_to_rgb(image), header.orientation))
    except Exception as error:  # decoders of broken files raise almost anything
        raise _refusal(picture.where, str(error)) from error


def _header(uri: str, where: str) -> PictureHeader:
    head, comma, coded = uri.partition(",")
    if not comma or len(head) > _HEAD_CHARACTERS or not _HEAD.fullmatch(head):
        message = (
            f"{where}: got {quoted(uri)}; this server does not load URLs or files: send the image itself, as "
            "'data:image/png;base64,' and the base64 of its file"
        )
        raise RequestError(400, message, where)
    try:
        return read_header(_from_base64(coded))
    except (PictureError, binascii.Error, UnicodeEncodeError) as error:
        raise _refusal(where, str(error)) from error


def _from_base64(coded: str) -> bytes:
    """Decode base64 of either alphabet (RFC 4648, sections 4 and 5).

    Line breaks and padding are optional.
    """
    if "%" in coded:
        for code, character in _PERCENT_CODES.items():
            coded = coded.replace(code, character).replace(code.lower(), character)
    data = coded.encode("ascii").translate(_ONE_ALPHABET, b" \t\r\n\f\v").rstrip(b"=")
    if len(data) % 4 == 1:
        raise PictureError("its base64 is truncated")
    return binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)


def _check_size(width: int, height: int, where: str, most: int) -> None:
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        message = (
            f"{where}: {width} x {height} pixels; sides of at least 1 and an aspect ratio of at most "
            f"{MAX_ASPECT}:1 are needed"
        )
        raise RequestError(400, message, where)
    if width * height > most:
        message = f"{where}: {width} x {height} is more than {most} pixels; scale the image down"
        raise RequestError(400, message, where)


def _to_rgb(image: Pillow.Image) -> Pillow.Image:
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow's own conversion would clip at 255
        return Pillow.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    ground = Pillow.new("RGB", image.size, "white")
    ground.paste(seen, mask=seen.getchannel("A"))
    return ground


def _upright(image: Pillow.Image, orientation: int) -> Pillow.Image:
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _refusal(where: str, reason: str) -> RequestError:
    reason = shorten(reason, QUOTED_CHARACTERS, quote=False)
    return RequestError(400, f"{where}: not an image ({reason}); accepted: {FORMATS} in base64", where)
