"""Actions in the OpenPI form."""
