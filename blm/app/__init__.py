"""Applications built from the other packages: recipes and their stages, model loading, export, checks."""
