"""Curation of corpora: named steps, balance, replay."""
