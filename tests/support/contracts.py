"""Contracts of policies that tests make up."""

from __future__ import annotations

from blm.robots import ROBOTS
from blm.types import PolicyContract

CONTRACT = PolicyContract(
    action_spaces={name: robot.action_space for name, robot in ROBOTS.items()},
    cameras=("base",),
    image_size=32,
    horizon=6,
    execute=4,
)
"""A small contract for all robots and one camera."""
