"""What nano learns before Stage I."""
