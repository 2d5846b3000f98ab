"""The weights of a backbone: whole or a part, frozen, and hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from blm.backbone.hashing import hash_tensors
from blm.backbone.partial import NO_HEAD, Absent
from blm.types import BlmError


class Weights:
    """A model of transformers whose weights are all loaded, or only up to some block."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.absent: Absent | None = None
        """What of the model is not loaded; None: nothing."""

    def require_whole(self) -> None:
        """Raise BlmError if only a part of the model is loaded."""
        if self.absent is not None:
            raise BlmError(NO_HEAD)

    def freeze(self) -> None:
        """Switch to evaluation mode, and stop gradients of all parameters."""
        self.model.eval().requires_grad_(False)

    def fingerprint(self) -> str:
        """Return the sha256 of all stored tensors (parameters and persistent buffers) in their
        present precision, by sorted name.

        Buffers that are computed when a model is made, such as the frequencies of rotary positions,
        are left out: they differ between processors and library versions. Tensors that are not
        loaded are read from their files, so the hash is that of the whole model.
        """
        stored = self.model.state_dict().keys()
        return self._hash({name: value for name, value in self.model.named_buffers() if name in stored})

    def fingerprint_with_computed_buffers(self) -> str:
        """Return the hash that older checkpoints store: of all parameters and all buffers."""
        return self._hash(dict(self.model.named_buffers()))

    def _hash(self, buffers: Mapping[str, Tensor]) -> str:
        digest = hashlib.sha256()
        stored: Mapping[str, Tensor] = {**dict(self.model.named_parameters()), **buffers}
        if self.absent is not None:
            stored = self.absent.beside(stored, self.model.dtype)
        hash_tensors(digest, stored)
        return digest.hexdigest()
