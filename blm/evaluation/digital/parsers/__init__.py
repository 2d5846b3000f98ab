"""Parsers that read the answer from a model's text."""
