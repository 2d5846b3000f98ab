"""Stage I (`sft`), Stage II (`policy`), the pretraining of nano, and the loop and caches of all."""
