"""Vision cache: features of recent images, reused when an action or a question shows them again."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, is_grad_enabled

from blm.backbone.hashing import hash_tensors
from blm.backbone.model import MultimodalModel

MAX_BYTES = 256 * 2**20
"""Maximum size of all cached features; Qwen2.5-VL's largest image has 134 MB."""


def cache_vision_features(
    backbone: MultimodalModel, max_entries: int = 8, max_bytes: int = MAX_BYTES
) -> None:
    """Let `backbone` cache its vision features in a least-recently-used cache, in place.

    For frozen weights only: calls with gradients, or in training mode, bypass the cache. An entry
    holds the features of all images of one call, so a question about the frame of the latest action
    does not run the vision tower again. Thread-safe. Does nothing for a model without a vision
    tower.
    """
    base: Any = backbone.model.base_model
    get_image_features = getattr(base, "get_image_features", None)
    if get_image_features is None:
        return
    cache, lock = OrderedDict[str, tuple[Any, int]](), threading.Lock()

    def cached_image_features(*args: Any, **kwargs: Any) -> Any:
        if is_grad_enabled() or base.training:
            return get_image_features(*args, **kwargs)
        key = _cache_key(args, kwargs)
        with lock:
            if key in cache:
                cache.move_to_end(key)
                return cache[key][0]
        features = get_image_features(*args, **kwargs)
        size = _bytes_of(features)
        with lock:
            if size <= max_bytes:
                cache[key] = features, size
            while len(cache) > max_entries or sum(size for _, size in cache.values()) > max_bytes:
                cache.popitem(last=False)
        return features

    base.get_image_features = cached_image_features


def _cache_key(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return a hash of the arguments, positional or named; None stands for the model's setting."""
    values = [*args, *(value for name, value in kwargs.items() if name not in ("use_cache", "return_dict"))]
    return content_key({f"{n:03}": value for n, value in enumerate(v for v in values if v is not None)})


def _bytes_of(features: Any) -> int:
    """Return the size of the tensors in a model's output, each storage counted once."""
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
    """Return a hash of named values: tensors by dtype, shape and bytes, others by their repr."""
    digest = hashlib.blake2b(digest_size=16)
    hash_tensors(digest, values)
    return digest.hexdigest()
