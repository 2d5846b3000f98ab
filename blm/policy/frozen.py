"""Proof that the backbone of a policy is, bit for bit, the one that the policy was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console

from blm.backbone.backbone import Backbone
from blm.types import BlmError


@dataclass(frozen=True)
class FrozenProof:
    """Proof that a backbone is unchanged: the hash of its weights decides, and its logits on fixed
    prompts inform."""

    fingerprint: str
    """Hash of the weights, which is part of the policy's revision. In older checkpoints it covers
    computed buffers, too."""
    logits: tuple[float, ...]
    """About 256 of the logits on the probe prompts; none if only a part of the backbone was loaded."""
    weights: str = ""
    """sha256 of all stored tensors (`Backbone.fingerprint`); empty in older checkpoints."""

    @classmethod
    def of(cls, backbone: Backbone) -> FrozenProof:
        """Return the proof of a backbone in its present state."""
        weights = backbone.fingerprint()
        return cls(weights, () if backbone.absent else _probe(backbone), weights)

    def with_logits(self, backbone: Backbone) -> FrozenProof:
        """Return the proof with logits; those of a whole `backbone` if it has none."""
        return self if self.logits else replace(self, logits=_probe(backbone))

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> FrozenProof:
        """Return the proof that the config.json of a checkpoint holds."""
        return cls(stored["fingerprint"], tuple(stored["logits"]), stored.get("weights", ""))

    def require(self, backbone: Backbone, where: str, *, weights: str = "") -> None:
        """Raise BlmError unless the weights of `backbone`, in the precision in which they were
        hashed, are unchanged. `weights` is its `Backbone.fingerprint`, where that is known."""
        if self.weights:
            now, then = weights or backbone.fingerprint(), self.weights
            remedy = "restore it or train Stage II again"
        else:
            now, then = backbone.fingerprint_with_computed_buffers(), self.fingerprint
            remedy = (
                "restore it or train Stage II again. The hash of this older checkpoint covers values that "
                "another processor or library version computes otherwise"
            )
        if now != then:
            raise BlmError(
                f"{where}: the backbone (fingerprint {now[:12]}) is not the frozen one of Stage II "
                f"({then[:12]}); {remedy}"
            )

    def compare_logits(self, backbone: Backbone, where: str) -> float:
        """Return the largest difference of the probe logits, and print a warning if it exceeds
        rounding.

        Precision, device and library versions change logits a little, so they prove nothing about
        the weights. Raises BlmError for a backbone of which only a part is loaded.
        """
        difference = float(np.abs(np.subtract(_probe(backbone), self.logits)).max())
        if not difference <= _logit_rounding(backbone):
            Console(stderr=True).print(
                f"warning: {where}: logits of the frozen backbone differ by {difference:.3g} from those at "
                f"training, with the same weights ({backbone.model.dtype} on {backbone.model.device}); check "
                "the versions of torch and transformers, and the attention implementation",
                highlight=False,
                soft_wrap=True,
            )
        return difference


def _probe(backbone: Backbone) -> tuple[float, ...]:
    logits = backbone.probe_logits().flatten()
    return tuple(logits[:: max(1, len(logits) // 256)].tolist())


def _logit_rounding(backbone: Backbone) -> float:
    """Return the difference of logits that rounding explains: between two correct bfloat16 kernels
    0.56 was measured, and 0.021 with TF32."""
    if backbone.model.dtype != torch.float32:
        return 1.0
    return 0.01 if backbone.model.device.type == "cpu" else 0.1
