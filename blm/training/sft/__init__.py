"""Stage I: supervised fine-tuning."""
