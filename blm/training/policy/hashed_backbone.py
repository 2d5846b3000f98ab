"""A backbone with the hash of its weights, which is computed once in a run."""

from __future__ import annotations

from dataclasses import dataclass

from blm.backbone.backbone import Backbone


@dataclass(frozen=True)
class HashedBackbone:
    """A backbone, its source and its hash, for all that records or compares them.

    Hashing 7 billion parameters takes a minute, and caches, projections and checkpoints all ask for
    the hash. Whoever has to prove that the weights are unchanged computes it anew.
    """

    backbone: Backbone
    source: str
    """Name or folder from which worker processes load the backbone."""
    weights: str
    """`Backbone.fingerprint` of it."""

    @classmethod
    def of(cls, backbone: Backbone, source: str) -> HashedBackbone:
        """Return a backbone with the hash of its present weights."""
        return cls(backbone, source, backbone.fingerprint())
