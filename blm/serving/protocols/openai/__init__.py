"""Chat in the OpenAI form."""
