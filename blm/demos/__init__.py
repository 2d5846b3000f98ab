"""Demonstrations: tasks split into primitives, planned motions, an expert for any state, and the collector."""
