"""Normalisation and action transforms between a dataset and the network, each with its inverse.

Shape legend: N frames, H action steps, D dimensions; leading dimensions are allowed. Nothing is
clipped, so `inverse(forward(x)) == x` also holds outside the range seen in training. Inputs are
never modified.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blm.types import ActionSpace, BlmError, FloatArray

QUANTILES = (0.002, 0.998)
"""Quantiles of the training frames that map to -1 and 1: extremes without outliers (our choice)."""
MIN_HALF_RANGE = 0.01
"""Minimum half range that maps to 1 [rad or opening]; it limits the noise of a joint at rest."""
MOST_TURNS = 2.0
"""Maximum plausible joint position [turns]."""
MOST_OPENING = 10.0
"""Maximum plausible gripper opening; larger values are percentages or motor steps."""


@dataclass(frozen=True, eq=False)
class Normalize:
    """Affine map of [low, high] to [-1, 1].

    `low` and `high` are [D], or [H, D] for one range per step.
    """

    low: FloatArray
    high: FloatArray

    @property
    def _centre_and_half(self) -> tuple[FloatArray, FloatArray]:
        return (self.high + self.low) / 2, np.maximum((self.high - self.low) / 2, MIN_HALF_RANGE)

    def forward(self, values: FloatArray) -> FloatArray:
        centre, half = self._centre_and_half
        return (values - centre) / half

    def inverse(self, values: FloatArray) -> FloatArray:
        centre, half = self._centre_and_half
        return values * half + centre

    def to_json(self) -> dict[str, Any]:
        return {"low": np.asarray(self.low).tolist(), "high": np.asarray(self.high).tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Normalize:
        return cls(np.asarray(data["low"], np.float64), np.asarray(data["high"], np.float64))


@dataclass(frozen=True)
class ActionTransform:
    """Makes chunks [.., H, D] relative to their first state [.., D] and normalises them."""

    normalize: Normalize
    relative: tuple[bool, ...]
    """[D] dimensions that are relative to the state."""

    def forward(self, actions: FloatArray, state: FloatArray) -> FloatArray:
        return self.normalize.forward(actions - _origin(state, self.relative))

    def inverse(self, values: FloatArray, state: FloatArray) -> FloatArray:
        return self.normalize.inverse(values) + _origin(state, self.relative)


def _origin(state: FloatArray, relative: Sequence[bool]) -> FloatArray:
    """Return the origin of actions [.., 1, D]: the state in relative dimensions, 0 in others."""
    origin = np.array(state, dtype=np.float64)
    origin[..., ~np.asarray(relative)] = 0
    return origin[..., None, :]


@dataclass(frozen=True, kw_only=True)
class RobotTransforms:
    """All transforms of one robot's vectors, shared by training and control."""

    state: Normalize
    normalize_actions: Normalize
    relative: tuple[bool, ...]
    """[D] dimensions whose targets the network predicts relative to the current state."""

    @property
    def actions(self) -> ActionTransform:
        return ActionTransform(self.normalize_actions, self.relative)

    def to_json(self) -> dict[str, Any]:
        ranges = {"state": self.state.to_json(), "actions": self.normalize_actions.to_json()}
        arm_only = (*(True,) * (len(self.relative) - 1), False)
        uniform: bool | tuple[bool, ...] = self.relative
        if self.relative in (arm_only, (False,) * len(self.relative)):  # as in older files
            uniform = self.relative == arm_only
        return {"relative": uniform, **ranges}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RobotTransforms:
        state = Normalize.from_json(data["state"])
        actions = Normalize.from_json(data["actions"])
        relative = data["relative"]
        if isinstance(relative, bool):  # of all dimensions but the last, the gripper
            relative = (*(relative,) * (state.low.shape[-1] - 1), False)
        return cls(state=state, normalize_actions=actions, relative=tuple(relative))


def action_chunks(
    actions_ND: FloatArray, frames: NDArray[np.int64], ends: NDArray[np.int64], horizon: int
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Return the next `horizon` actions of frames [n, H, D] and their validity [n, H].

    `ends` [n] is one past the last frame of each frame's episode. Beyond it, the last action is
    repeated.
    """
    rows = frames[:, None] + np.arange(horizon)
    return actions_ND[np.minimum(rows, ends[:, None] - 1)], rows < ends[:, None]


def implausible_ranges(space: ActionSpace, *values: FloatArray) -> Iterator[str]:
    """Yield a message for each dimension of arrays [.., D] with implausible values."""
    for place, (name, unit) in enumerate(zip(space.names, space.units, strict=True)):
        low, high = (float(f([f(array[..., place]) for array in values])) for f in (np.min, np.max))
        if unit == "rad" and max(-low, high) > MOST_TURNS * 2 * np.pi:
            yield f"{name} goes from {low:.3g} to {high:.3g} rad; are these degrees? Convert them to rad"
        elif unit == "opening" and max(-low, high) > MOST_OPENING:
            yield f"{name} goes from {low:.3g} to {high:.3g}; convert it to 0 (closed) .. 1 (open)"


def fit_transforms(
    space: ActionSpace,
    states_ND: FloatArray,
    chunks_NHD: FloatArray,
    inside_NH: NDArray[np.bool_],
    relative: bool,
) -> RobotTransforms:
    """Fit the normalisation to training frames, per dimension; for actions per step and dimension.

    With `relative`, targets become differences from the state wherever the action space allows it.
    A gripper keeps the range of the action space, because its opening is bounded and often
    constant. Raises BlmError if no episode is as long as a chunk, and for implausible units.
    """
    if absurd := list(implausible_ranges(space, states_ND, chunks_NHD[inside_NH])):
        raise BlmError(f"'{space.robot}': {'; '.join(absurd)}")
    if not inside_NH.any(0).all():
        steps = inside_NH.shape[1]
        raise BlmError(f"'{space.robot}': no training episode has {steps} steps; reduce the horizon")
    offsets = tuple(relative and allowed for allowed in space.offsets_allowed)
    moved = chunks_NHD - _origin(states_ND, offsets)
    each_step = zip(moved.swapaxes(0, 1), inside_NH.T, strict=True)
    actions = np.stack([np.quantile(step[inside], QUANTILES, axis=0) for step, inside in each_step], axis=1)
    ranges = np.quantile(states_ND, QUANTILES, axis=0), actions
    gripper = np.array([kind == "gripper" for kind in space.dimension_kinds])
    for low, high in ranges:
        low[..., gripper], high[..., gripper] = (np.array(x)[gripper] for x in (space.low, space.high))
    state, normalize_actions = (Normalize(low, high) for low, high in ranges)
    return RobotTransforms(state=state, normalize_actions=normalize_actions, relative=offsets)
