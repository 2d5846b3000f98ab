"""OpenPI's websocket protocol for robot policies."""
