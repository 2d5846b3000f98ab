"""What happens to vectors between a dataset and the network. Every transform has its inverse.

Shape legend: N frames, H action steps, D dimensions; any leading dimensions are allowed. Nothing is clipped,
so `inverse(forward(x)) == x` also outside of the range seen in training. Inputs are never changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blm.types import ActionSpace, BlmError, FloatArray

QUANTILES = (0.002, 0.998)
"""Of the training frames, mapped to -1 and 1: the extremes, less a few outliers (choice)."""
MIN_HALF_RANGE = 0.01
"""Smallest half range [rad or opening] stretched to 1: a joint that never moves is not blown up to noise."""


@dataclass(frozen=True)
class RelativeJoints:
    """Arm targets minus current joint positions [rad]; the gripper, the last dimension, stays absolute."""

    def forward(self, actions: FloatArray, state: FloatArray) -> FloatArray:
        """Map actions [.., H, D], taken at raw state [.., D], towards the network."""
        return actions - _arm(state)

    def inverse(self, actions: FloatArray, state: FloatArray) -> FloatArray:
        return actions + _arm(state)


def _arm(state: FloatArray) -> FloatArray:
    arm = np.array(state, dtype=np.float64)
    arm[..., -1] = 0
    return arm[..., None, :]


@dataclass(frozen=True, eq=False)
class Normalize:
    """Affine map of [low, high] to [-1, 1]; `low` and `high` are [D], or [H, D] for one range per step."""

    low: FloatArray
    high: FloatArray

    @property
    def _centre_and_half(self) -> tuple[FloatArray, FloatArray]:
        return (self.high + self.low) / 2, np.maximum((self.high - self.low) / 2, MIN_HALF_RANGE)

    def forward(self, values: FloatArray, state: FloatArray | None = None) -> FloatArray:
        centre, half = self._centre_and_half
        return (values - centre) / half

    def inverse(self, values: FloatArray, state: FloatArray | None = None) -> FloatArray:
        centre, half = self._centre_and_half
        return values * half + centre

    def to_json(self) -> dict[str, Any]:
        return {"low": np.asarray(self.low).tolist(), "high": np.asarray(self.high).tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Normalize:
        return cls(np.asarray(data["low"], np.float64), np.asarray(data["high"], np.float64))


@dataclass(frozen=True)
class Compose:
    """Transforms applied in order; the inverse undoes them in the opposite order."""

    steps: tuple[RelativeJoints | Normalize, ...]

    def forward(self, actions: FloatArray, state: FloatArray) -> FloatArray:
        for step in self.steps:
            actions = step.forward(actions, state)
        return actions

    def inverse(self, actions: FloatArray, state: FloatArray) -> FloatArray:
        for step in reversed(self.steps):
            actions = step.inverse(actions, state)
        return actions


@dataclass(frozen=True, kw_only=True)
class RobotTransforms:
    """All that one robot's vectors pass through, in training and in control alike."""

    state: Normalize
    normalize_actions: Normalize
    relative: bool

    @property
    def actions(self) -> Compose:
        return Compose((*([RelativeJoints()] if self.relative else []), self.normalize_actions))

    def to_json(self) -> dict[str, Any]:
        ranges = {"state": self.state.to_json(), "actions": self.normalize_actions.to_json()}
        return {"relative": self.relative, **ranges}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RobotTransforms:
        state, actions = Normalize.from_json(data["state"]), Normalize.from_json(data["actions"])
        return cls(state=state, normalize_actions=actions, relative=data["relative"])


def action_chunks(
    actions_ND: FloatArray, frames: NDArray[np.int64], ends: NDArray[np.int64], horizon: int
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Return the next `horizon` actions [n, H, D] of each frame and which of them lie inside its episode.

    `ends` [n]: one past the last frame of each frame's episode. Beyond it the last action is repeated.
    """
    rows = frames[:, None] + np.arange(horizon)
    return actions_ND[np.minimum(rows, ends[:, None] - 1)], rows < ends[:, None]


def fit_transforms(
    space: ActionSpace,
    states_ND: FloatArray,
    chunks_NHD: FloatArray,
    inside_NH: NDArray[np.bool_],
    relative: bool,
) -> RobotTransforms:
    """Fit the ranges to training frames: one per joint, for actions one per (step, joint).

    The gripper keeps the range of the action space: its opening is bounded and often constant for long.
    Raises BlmError if no episode is as long as a chunk.
    """
    if not inside_NH.any(0).all():
        steps = inside_NH.shape[1]
        raise BlmError(f"'{space.robot}': no training episode has {steps} steps; shorten the horizon")
    moved = RelativeJoints().forward(chunks_NHD, states_ND) if relative else chunks_NHD
    steps = [np.quantile(moved[inside_NH[:, h], h], QUANTILES, axis=0) for h in range(moved.shape[1])]
    ranges = np.stack(steps, axis=1), np.quantile(states_ND, QUANTILES, axis=0)
    for low_high in ranges:
        low_high[0, ..., -1], low_high[1, ..., -1] = space.low[-1], space.high[-1]
    (action_low, action_high), (state_low, state_high) = ranges
    return RobotTransforms(
        state=Normalize(state_low, state_high),
        normalize_actions=Normalize(action_low, action_high),
        relative=relative,
    )
