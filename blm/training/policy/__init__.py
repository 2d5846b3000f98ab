"""Stage II: policy training."""
