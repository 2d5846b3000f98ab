"""Demonstrations: tasks split into primitives, planned motions, an expert for any state, the collector."""

from blm.demos.collect import CollectConfig, collect
from blm.demos.expert import Expert

__all__ = ["CollectConfig", "Expert", "collect"]
