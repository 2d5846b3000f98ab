"""What a model saw last: pictures that come again, for an action or in a question, are not seen again."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from blm.backbone.backbone import Backbone


def remember_sight(backbone: Backbone, most: int = 8) -> None:
    """Let `backbone` keep the features of the last `most` sets of pictures that it was given together.

    For frozen weights only. A set is the pictures of one pass, so a question about the frame that an action
    was just chosen for costs no second look if both came alone. Safe between threads. Does nothing for a
    model without pictures.
    """
    base: Any = backbone.model.base_model
    see = getattr(base, "get_image_features", None)
    if see is None:
        return
    seen, lock = OrderedDict[str, Any](), threading.Lock()

    def remembered(*given: Any, **named: Any) -> Any:
        if torch.is_grad_enabled() or base.training:
            return see(*given, **named)
        asked = {str(place): value for place, value in enumerate(given)} | named
        asked.pop("use_cache", None)  # a tower has no cache
        key = content_key(asked)
        with lock:
            if key in seen:
                seen.move_to_end(key)
                return seen[key]
        features = see(*given, **named)  # outside the lock: an action does not wait for a chat's pictures
        with lock:
            seen[key] = features
            seen.move_to_end(key)
            while len(seen) > most:
                seen.popitem(last=False)
        return features

    base.get_image_features = remembered


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
