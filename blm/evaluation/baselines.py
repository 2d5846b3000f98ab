"""Policies that know nothing: what a score must beat before it means anything.

They take the contract of the policy under test, so that both run under one protocol.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from blm.types import ActionChunk, FloatArray, Observation, PolicyContract

REACH_RAD = 0.2
"""A random target lies within this of the present joint position [rad]."""


class ZeroPolicy:
    """Holds still."""

    name = "zero"

    def __init__(self, contract: PolicyContract) -> None:
        self.contract = replace(contract, revision=self.name)

    def reset(self) -> None: ...

    def act(self, observation: Observation) -> ActionChunk:
        actions = np.tile(self.target(observation), (self.contract.horizon, 1))
        return ActionChunk(actions=actions, rate_hz=self.contract.rate_hz)

    def target(self, observation: Observation) -> FloatArray:
        """[D] where to go and stay for one chunk."""
        return observation.state


class RandomPolicy(ZeroPolicy):
    """Moves every joint to a random place nearby, and the gripper to a random opening."""

    name = "random"

    def target(self, observation: Observation) -> FloatArray:
        rng = np.random.default_rng(observation.seed)
        space = self.contract.action_spaces[observation.robot]
        target = observation.state + rng.uniform(-REACH_RAD, REACH_RAD, space.dim)
        target[-1] = rng.uniform()
        return np.clip(target, space.low, space.high).astype(np.float32)
