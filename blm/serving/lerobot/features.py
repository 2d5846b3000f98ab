"""How the features of a LeRobot policy correspond to a robot's state, actions and cameras.

Shape legend: S dimensions of the state, D of the action, H steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from blm.types import ActionSpace, BlmError, FloatArray, PolicyContract

ACTION = "action"
"""LeRobot's name of a policy's output."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a policy keeps one number, and its unit: ours is (theirs - zero) * scale."""

    feature: str
    index: int
    scale: float = 1.0
    zero: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """The inputs and outputs of a LeRobot policy in the terms of this package."""

    action_spaces: Mapping[str, ActionSpace]
    """Robot -> action space; all of one length."""
    cameras: Mapping[str, str]
    """Camera -> feature of the policy."""
    sides: Mapping[str, int]
    """Camera -> side of the square pictures that the policy sees [px]."""
    state: tuple[Place, ...]
    """[S] in the order of the robot's state; empty for a policy that sees pictures only."""
    action: tuple[Place, ...]
    """[D] in the order of the robot's action."""
    rate_hz: float = 20.0
    revision: str = ""
    """Hash of the policy's files."""

    @property
    def image_size(self) -> int:
        """Side of the pictures on the wire [px]: the largest of the policy's; smaller ones are scaled
        from it."""
        return max(self.sides.values(), default=16)

    def vectors(self, state: FloatArray) -> dict[str, FloatArray]:
        """Return feature -> float32 vector in the policy's units, of a state [S]."""
        lengths: dict[str, int] = {}
        for place in self.state:
            lengths[place.feature] = max(lengths.get(place.feature, 0), place.index + 1)
        vectors = {name: np.zeros(length, np.float32) for name, length in lengths.items()}
        values = np.asarray(state, np.float64) if self.state else ()
        for place, value in zip(self.state, values, strict=True):
            vectors[place.feature][place.index] = value / place.scale + place.zero
        return vectors

    def actions(self, outputs: FloatArray) -> FloatArray:
        """Return float32 actions [H, D] of a policy's outputs [H, K].

        Raises BlmError unless the outputs are finite and K is D.
        """
        outputs = np.asarray(outputs, np.float64)
        if outputs.ndim != 2 or not len(outputs) or outputs.shape[1] != len(self.action):
            raise BlmError(
                f"the policy's actions have the shape {outputs.shape}; needed: (steps, {len(self.action)})"
            )
        if not np.isfinite(outputs).all():
            raise BlmError("the policy's actions are not finite")
        index, zero, scale = (
            np.array([getattr(p, k) for p in self.action]) for k in ("index", "zero", "scale")
        )
        return ((outputs[:, index] - zero) * scale).astype(np.float32)

    def contract(self, horizon: int, execute: int) -> PolicyContract:
        """Return the contract of the policy, whose chunks have `horizon` actions."""
        return PolicyContract(
            action_spaces=self.action_spaces,
            cameras=tuple(self.cameras),
            image_size=self.image_size,
            horizon=horizon,
            execute=execute,
            rate_hz=self.rate_hz,
            revision=self.revision,
        )

    def to_json(self) -> dict[str, Any]:
        spaces = {robot: space.to_json() for robot, space in self.action_spaces.items()}
        return {**asdict(self), "action_spaces": spaces}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FeatureMap:
        """Read `to_json`. Raises TypeError or KeyError for another form."""
        spaces = {robot: ActionSpace.from_json(space) for robot, space in value["action_spaces"].items()}
        places = {part: tuple(Place(**one) for one in value[part]) for part in ("state", "action")}
        return cls(**{**value, "action_spaces": spaces, **places})
