"""Demonstrations: tasks split into primitives, planned motions, an expert for any state, the
collector.
"""

from blm.planner.collect import CollectConfig, collect
from blm.planner.expert import Expert

__all__ = ["CollectConfig", "Expert", "collect"]
