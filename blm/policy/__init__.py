"""From hidden states to actions: flow matching with a diffusion transformer; checkpoints."""

from blm.policy.network import PolicyConfig
from blm.policy.policy import CheckpointPolicy

__all__ = ["CheckpointPolicy", "PolicyConfig"]
