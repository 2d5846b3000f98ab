"""A contract and a policy for the playground."""

from __future__ import annotations

import numpy as np

from blm.robots import ROBOTS
from blm.types import ActionChunk, Observation, PolicyContract

CONTRACT = PolicyContract(
    action_spaces={name: ROBOTS[name].action_space for name in ("panda", "xarm6")},
    cameras=("base", "side", "wrist"),
    image_size=32,
    horizon=4,
    execute=2,
    revision="still",
)


class StillPolicy:
    """Holds the arm where it is, and remembers what it was told."""

    contract = CONTRACT

    def __init__(self) -> None:
        self.told = list[str]()

    def act(self, observation: Observation) -> ActionChunk:
        self.told.append(observation.instruction)
        return ActionChunk(actions=np.tile(observation.state, (4, 1)))

    def reset(self) -> None: ...
