"""From hidden states to motion: flow matching with a diffusion transformer, and the checkpoint
folder."""

from blm.policy.network import PolicyConfig
from blm.policy.policy import CheckpointPolicy

__all__ = ["CheckpointPolicy", "PolicyConfig"]
