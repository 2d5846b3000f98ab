"""Normalisation and action transforms between a dataset and the network, each with its inverse.

Shape legend: N frames, H action steps, D dimensions of the action, S of the state; leading
dimensions are allowed. Nothing is clipped, so `inverse(forward(x)) == x` also holds outside the
range seen in training. Inputs are never modified.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blm.types import ActionKind, ActionSpace, BlmError, FloatArray

QUANTILES = (0.002, 0.998)
"""Quantiles of the training frames that map to -1 and 1: extremes without outliers (our choice)."""
MIN_HALF_RANGE = 0.01
"""Minimum half range that maps to 1 [rad or opening]; it limits the noise of a joint at rest."""
LEAST_HALF_RANGE: Mapping[ActionKind, float] = {
    "absolute_eef_position": 1e-3,
    "delta_eef_position": 1e-3,
    "delta_eef_rotation": 1e-3,
    "delta_joint_position": 1e-3,
    "other": 1e-4,
}
"""The same for kinds whose ordinary values are smaller [m, rad, ..]. A dimension that stands still in
almost all training frames, such as the rotation of a tool that points down, has this half range: a
smaller one would turn its rare motions into values of hundreds, which no training survives."""
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
    least: FloatArray | float = MIN_HALF_RANGE
    """Minimum half range, of all dimensions or [D]."""

    @property
    def _centre_and_half(self) -> tuple[FloatArray, FloatArray]:
        return (self.high + self.low) / 2, np.maximum((self.high - self.low) / 2, self.least)

    def forward(self, values: FloatArray) -> FloatArray:
        centre, half = self._centre_and_half
        return (values - centre) / half

    def inverse(self, values: FloatArray) -> FloatArray:
        centre, half = self._centre_and_half
        return values * half + centre

    def to_json(self) -> dict[str, Any]:
        value = {"low": np.asarray(self.low).tolist(), "high": np.asarray(self.high).tolist()}
        if not np.all(np.asarray(self.least) == MIN_HALF_RANGE):  # as in older files
            value["least"] = np.asarray(self.least).tolist()
        return value

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Normalize:
        low, high, least = (
            np.asarray(data.get(k, MIN_HALF_RANGE), np.float64) for k in ("low", "high", "least")
        )
        return cls(low, high, least)


@dataclass(frozen=True)
class ActionTransform:
    """Makes chunks [.., H, D] relative to their first state [.., S] and normalises them."""

    normalize: Normalize
    relative: tuple[bool, ...]
    """[D] dimensions that are relative to the state."""
    origins: tuple[int, ...] = ()
    """[D] the dimension of the state that each is relative to; empty: the one in the same place."""

    def forward(self, actions: FloatArray, state: FloatArray) -> FloatArray:
        return self.normalize.forward(actions - _origin(state, self.relative, self.origins))

    def inverse(self, values: FloatArray, state: FloatArray) -> FloatArray:
        return self.normalize.inverse(values) + _origin(state, self.relative, self.origins)


def _origin(state: FloatArray, relative: Sequence[bool], origins: Sequence[int]) -> FloatArray:
    """Return the origin of actions [.., 1, D]: the state in relative dimensions, 0 in others."""
    measured, moved = np.asarray(state, np.float64), np.asarray(relative, bool)
    places = np.asarray(origins if len(origins) else range(len(moved)), np.int64)
    origin = np.zeros((*measured.shape[:-1], len(moved)))
    origin[..., moved] = measured[..., places[moved]]
    return origin[..., None, :]


@dataclass(frozen=True, kw_only=True)
class RobotTransforms:
    """All transforms of one robot's vectors, shared by training and control."""

    state: Normalize
    normalize_actions: Normalize
    relative: tuple[bool, ...]
    """[D] dimensions whose targets the network predicts relative to the current state."""
    origins: tuple[int, ...] = ()
    """[D] the dimension of the state of each; empty: the one in the same place."""

    @property
    def actions(self) -> ActionTransform:
        return ActionTransform(self.normalize_actions, self.relative, self.origins)

    def to_json(self) -> dict[str, Any]:
        ranges = {"state": self.state.to_json(), "actions": self.normalize_actions.to_json()}
        arm_only = (*(True,) * (len(self.relative) - 1), False)
        uniform: bool | tuple[bool, ...] = self.relative
        if self.relative in (arm_only, (False,) * len(self.relative)):  # as in older files
            uniform = self.relative == arm_only
        apart = {"origins": list(self.origins)} if self.origins else {}
        return {"relative": uniform, **ranges, **apart}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RobotTransforms:
        state = Normalize.from_json(data["state"])
        actions = Normalize.from_json(data["actions"])
        relative = data["relative"]
        if isinstance(relative, bool):  # of all dimensions but the last, the gripper
            relative = (*(relative,) * (actions.low.shape[-1] - 1), False)
        origins = tuple(data.get("origins", ()))
        return cls(state=state, normalize_actions=actions, relative=tuple(relative), origins=origins)


def transforms_to_json(transforms: Mapping[str, RobotTransforms]) -> dict[str, Any]:
    """Return the content of stats.json."""
    return {robot: values.to_json() for robot, values in transforms.items()}


def statistics_hash(transforms: Mapping[str, RobotTransforms]) -> str:
    """Return the hash by which contracts name the normalisation; robots may come in any order."""
    return hashlib.sha256(json.dumps(transforms_to_json(transforms), sort_keys=True).encode()).hexdigest()[
        :16
    ]


def action_chunks(
    actions_ND: FloatArray, frames: NDArray[np.int64], ends: NDArray[np.int64], horizon: int
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Return the next `horizon` actions of frames [n, H, D] and their validity [n, H].

    `ends` [n] is one past the last frame of each frame's episode. Beyond it, the last action is
    repeated.
    """
    rows = frames[:, None] + np.arange(horizon)
    return actions_ND[np.minimum(rows, ends[:, None] - 1)], rows < ends[:, None]


def implausible_ranges(space: ActionSpace, states: FloatArray, actions: FloatArray) -> Iterator[str]:
    """Yield a message for each dimension with implausible values in states [.., S] or actions [.., D]."""
    told = set[str]()
    for values, names, units in (
        (states, space.state_names, space.state_units),
        (actions, space.names, space.units),
    ):
        for place, (name, unit) in enumerate(zip(names, units, strict=True)):
            what = _implausible(name, unit, float(values[..., place].min()), float(values[..., place].max()))
            if what and name not in told:
                told.add(name)
                yield what


def _implausible(name: str, unit: str, low: float, high: float) -> str:
    if unit == "rad" and max(-low, high) > MOST_TURNS * 2 * np.pi:
        return f"{name} goes from {low:.3g} to {high:.3g} rad; are these degrees? Convert them to rad"
    if unit == "opening" and max(-low, high) > MOST_OPENING:
        return f"{name} goes from {low:.3g} to {high:.3g}; convert it to 0 (closed) .. 1 (open)"
    return ""


def fit_transforms(
    space: ActionSpace,
    states_NS: FloatArray,
    chunks_NHD: FloatArray,
    inside_NH: NDArray[np.bool_],
    relative: bool,
) -> RobotTransforms:
    """Fit the normalisation to training frames, per dimension; for actions per step and dimension.

    With `relative`, targets become differences from the state wherever the action space allows it.
    A gripper keeps the range 0..1, because its opening is bounded and often constant. Raises
    BlmError if no episode is as long as a chunk, and for implausible units.
    """
    if absurd := list(implausible_ranges(space, states_NS, chunks_NHD[inside_NH])):
        raise BlmError(f"'{space.robot}': {'; '.join(absurd)}")
    if not inside_NH.any(0).all():
        steps = inside_NH.shape[1]
        raise BlmError(f"'{space.robot}': no training episode has {steps} steps; reduce the horizon")
    offsets = tuple(relative and allowed for allowed in space.offsets_allowed)
    moved = chunks_NHD - _origin(states_NS, offsets, space.origins)
    each_step = zip(moved.swapaxes(0, 1), inside_NH.T, strict=True)
    actions = np.stack([np.quantile(step[inside], QUANTILES, axis=0) for step, inside in each_step], axis=1)
    state = _normalize(np.quantile(states_NS, QUANTILES, axis=0), space.state_kinds)
    return RobotTransforms(
        state=state,
        normalize_actions=_normalize(actions, space.dimension_kinds),
        relative=offsets,
        origins=space.origins if space.state is not None else (),
    )


def _normalize(ranges: FloatArray, kinds: Sequence[ActionKind]) -> Normalize:
    """Return the map of ranges [2, .., D]; a gripper has that of all openings."""
    low, high = ranges
    gripper = np.array([kind == "gripper" for kind in kinds], bool)
    low[..., gripper], high[..., gripper] = 0.0, 1.0
    least = np.array([LEAST_HALF_RANGE.get(kind, MIN_HALF_RANGE) for kind in kinds])
    return Normalize(low, high, least if (least != MIN_HALF_RANGE).any() else MIN_HALF_RANGE)
