"""Memory and disk space of a recipe, measured on models whose weights take no memory."""
