"""Settings of a tiny policy."""

from blm.bridge import BridgeConfig
from blm.policy.network import PolicyConfig

POLICY = PolicyConfig(
    bridge=BridgeConfig(width=16, latents=3, blocks=1, heads=2),
    width=32,
    heads=2,
    max_dim=5,
    horizon=6,
    future_steps=6,
)
