"""Recipes and their stages, model loading, export and checks, composed from the other packages."""
