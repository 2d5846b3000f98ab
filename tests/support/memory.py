"""Pictures as data URIs, and a limit on the memory that a call may take."""

from __future__ import annotations

import base64
import io
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image as Pillow

MEGABYTE = 2**20


@contextmanager
def memory_below(most: float) -> Iterator[None]:
    """Fail if Python allocates more than `most` bytes in the context. Pillow's own memory is not counted."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def data_uri(image: Pillow.Image, form: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return as_uri(buffer.getvalue(), form)


def as_uri(data: bytes, form: str = "PNG") -> str:
    return f"data:image/{form.lower()};base64,{base64.b64encode(data).decode()}"
