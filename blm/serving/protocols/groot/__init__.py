"""The ZeroMQ protocol of Isaac-GR00T's PolicyClient."""
