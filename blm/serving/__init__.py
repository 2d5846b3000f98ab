"""Serve a Policy and a Chat on one port (`blm.serving.app`), and use a remote Policy."""

from blm.serving.client import RemotePolicy

__all__ = ["RemotePolicy"]
