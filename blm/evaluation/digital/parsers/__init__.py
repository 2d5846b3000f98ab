"""From a model's words to the answer that it gave."""
