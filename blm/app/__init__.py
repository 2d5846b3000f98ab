"""Composition: what the commands do, built from the rooms below."""
