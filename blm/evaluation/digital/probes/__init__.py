"""Probes of a language model: prompts whose answers a program checks."""
