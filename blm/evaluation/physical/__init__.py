"""Closed-loop evaluation of policies."""
