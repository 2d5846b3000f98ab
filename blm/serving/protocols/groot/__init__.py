"""Actions for clients of Isaac-GR00T."""
