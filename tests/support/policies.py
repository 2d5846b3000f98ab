"""A tiny policy with random weights, and observations for it."""

from __future__ import annotations

import numpy as np
import torch

from blm.backbone.backbone import Backbone
from blm.backbone.nano.model import make_nano
from blm.bridge import BridgeConfig
from blm.datasets.transforms import Normalize, RobotTransforms
from blm.policy.frozen import FrozenProof
from blm.policy.network import PolicyConfig, PolicyNetwork
from blm.policy.policy import CheckpointPolicy
from blm.policy.tap import TapConfig
from blm.types import ActionSpace, Observation, PolicyContract

CONFIG = PolicyConfig(
    bridge=BridgeConfig(width=16, latents=3, blocks=1, heads=2),
    width=32,
    blocks=4,
    heads=2,
    max_dim=6,
    horizon=5,
)
DIMS = (4, 6)
"""Real dimensions of the two robots of these tests."""


def make_policy(seed: int = 0, config: PolicyConfig = CONFIG) -> CheckpointPolicy:
    """Return a policy with random weights for two robots, on a random nano of two blocks."""
    backbone = Backbone(*make_nano(seed=0, layers=2, width=32))
    torch.manual_seed(seed)
    spaces, transforms = {}, {}
    for robot, dim in zip(("arm", "leg"), DIMS, strict=True):
        spaces[robot] = ActionSpace(
            robot=robot,
            names=(*(f"j{i}" for i in range(dim - 1)), "gripper"),
            units=("rad",) * (dim - 1) + ("opening",),
            low=(-1.0,) * (dim - 1) + (0.0,),
            high=(1.0,) * (dim - 1) + (1.0,),
        )
        steps = Normalize(np.full((5, dim), -0.5), np.full((5, dim), 0.7))
        state = Normalize(np.full(dim, -1.0), np.full(dim, 1.0))
        arm = tuple(i < dim - 1 for i in range(dim))
        transforms[robot] = RobotTransforms(state=state, normalize_actions=steps, relative=arm)
    return CheckpointPolicy(
        backbone=backbone,
        frozen=FrozenProof.of(backbone),
        tap=TapConfig(layer=2),
        network=PolicyNetwork(config, 32, 2),
        transforms=transforms,
        contract=PolicyContract(
            action_spaces=spaces, cameras=("base", "wrist"), image_size=32, horizon=5, execute=3
        ),
    )


def make_observation(robot: str = "arm", seed: int = 0) -> Observation:
    """Return a random observation, with a camera that the policy does not use."""
    rng = np.random.default_rng(seed)
    images = {camera: rng.integers(0, 255, (32, 32, 3), np.uint8) for camera in ("wrist", "side", "base")}
    state = rng.uniform(-0.5, 0.5, DIMS[robot == "leg"])
    return Observation(images=images, state=state, instruction="go" * (seed + 1), robot=robot, seed=seed)
