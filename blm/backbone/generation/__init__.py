"""Answers token by token, for many conversations at once."""
