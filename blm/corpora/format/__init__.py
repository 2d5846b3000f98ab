"""The corpus format: messages, faults, validation."""
