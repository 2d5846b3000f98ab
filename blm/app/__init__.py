"""Recipes and their stages, model loading, export, checks: built from the other packages."""
