"""Pretraining of nano, before Stage I."""
