"""OpenAI-compatible chat completions, model list and tokenization."""
