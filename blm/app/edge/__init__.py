"""Export of policies for computers without torch."""
