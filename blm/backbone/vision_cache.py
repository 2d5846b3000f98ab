"""What a model saw last: pictures that come again, for an action or in a question, are not seen again."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from blm.backbone.backbone import Backbone


MAX_BYTES = 256 * 2**20
"""Features that are kept at most. One picture of 16,384 tokens, Qwen2.5-VL's largest, has 134 MB of them."""


def remember_sight(backbone: Backbone, most: int = 8, max_bytes: int = MAX_BYTES) -> None:
    """Let `backbone` keep the features of the last `most` sets of pictures that it was given together.

    For frozen weights only. A set is the pictures of one pass, so a question about the frame that an action
    was just chosen for costs no second look if both came alone. Together they have at most `max_bytes`.
    Several threads may look at once. Does nothing for a model without pictures.
    """
    base: Any = backbone.model.base_model
    see = getattr(base, "get_image_features", None)
    if see is None:
        return
    seen, lock = OrderedDict[str, tuple[Any, int]](), threading.Lock()

    def remembered(*given: Any, **named: Any) -> Any:
        if torch.is_grad_enabled() or base.training:
            return see(*given, **named)
        key = _key_of(given, named)
        with lock:
            if key in seen:
                seen.move_to_end(key)
                return seen[key][0]
        features = see(*given, **named)
        size = _bytes_of(features)
        with lock:
            if size <= max_bytes:
                seen[key] = features, size
            while len(seen) > most or sum(size for _, size in seen.values()) > max_bytes:
                seen.popitem(last=False)
        return features

    base.get_image_features = remembered


def _key_of(given: Sequence[Any], named: Mapping[str, Any]) -> str:
    """A hash of what was asked, whether by place or by name; None stands for a model's own setting."""
    asked = [*given, *(value for name, value in named.items() if name not in ("use_cache", "return_dict"))]
    return content_key(
        {f"{place:03}": value for place, value in enumerate(v for v in asked if v is not None)}
    )


def _bytes_of(features: Any) -> int:
    """Size of the tensors in a model's output, each counted once."""
    found, todo = dict[int, int](), [features]
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, Mapping):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
    return sum(found.values())


def content_key(values: Mapping[str, Any]) -> str:
    """Return a hash of named values: of tensors precision, shape and content, of others how they print."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(values):
        value = values[name]
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()
