"""Demonstrations: motion primitives, motion planning, the expert and the collector."""

from blm.planner.collect import CollectConfig, collect
from blm.planner.expert import Expert

__all__ = ["CollectConfig", "Expert", "collect"]
