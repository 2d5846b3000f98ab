"""Caches of values that a frozen model computes once, in files: filled by all processes together."""
