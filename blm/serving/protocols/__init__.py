"""Wire protocols: OpenAI chat completions, OpenPI websockets, Isaac-GR00T over ZeroMQ."""
