"""Hashes of tensors: of frozen weights, and of images whose features are cached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class Digest(Protocol):
    """A hash object of `hashlib`."""

    def update(self, data: Any, /) -> None: ...


def hash_tensors(digest: Digest, values: Mapping[str, Any]) -> None:
    """Add named values to a digest, sorted by name.

    Tensors are hashed by dtype, shape and bytes, other values by their repr.
    """
    for name in sorted(values):
        value = values[name]
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy())
        else:
            digest.update(f"{name} {value!r}".encode())
