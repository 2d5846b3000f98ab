"""Baselines that are trained here: policies without a language model."""
