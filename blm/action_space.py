"""`ActionSpace`: names, units, limits and kinds of the dimensions of a robot's actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from blm.errors import BlmError, ContractError, lookup, shorten

FloatArray = NDArray[np.floating[Any]]
ActionKind = Literal[
    "absolute_joint_position",
    "delta_joint_position",
    "joint_velocity",
    "absolute_eef_position",
    "delta_eef_position",
    "absolute_eef_rotation",
    "delta_eef_rotation",
    "gripper",
    "unknown",
]
"""Kind of a dimension. "eef" is the end effector, in the robot's base frame; a delta is relative to
the state at its control step; "gripper" is an absolute opening."""
ACTION_KINDS: tuple[str, ...] = get_args(ActionKind)


def as_array(value: Any, what: str) -> NDArray[Any]:
    """Return `value` as a numeric array. Raises ContractError for any other value."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ContractError(f"{what} is not an array of numbers: {shorten(error)}") from error
    if array.dtype.kind not in "iuf":
        raise ContractError(f"{what} is not an array of numbers: it is {array.dtype} {array.shape}")
    return array


def as_float32(value: Any, what: str) -> FloatArray:
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, which no caller accepts
        return as_array(value, what).astype(np.float32, copy=False)


@dataclass(frozen=True, kw_only=True)
class ActionSpace:
    """The meaning of a robot's actions, by default absolute joint-position targets, then the gripper
    opening.

    State vectors use the same order, names and units: by default joint positions, then the measured
    gripper opening.
    """

    robot: str
    names: tuple[str, ...]
    """One per dimension; the last is 'gripper' unless `kinds` says otherwise."""
    units: tuple[str, ...]
    """'rad' for joints, 'opening' (0 closed .. 1 open) for the gripper, 'm' for positions of the
    end effector, 'rad/s' for velocities."""
    low: tuple[float, ...]
    high: tuple[float, ...]
    rate_hz: float = 20.0
    kind: Literal["absolute_joint_position", "per_dimension", "unknown"] = "absolute_joint_position"
    """"per_dimension" if `kinds` states them; "unknown" in datasets of other programs, which do not
    state it."""
    kinds: tuple[ActionKind, ...] = ()
    """One per dimension if `kind` is "per_dimension", and otherwise empty."""

    def __post_init__(self) -> None:
        lengths = {len(self.names), len(self.units), len(self.low), len(self.high)}
        if len(lengths) != 1:
            raise BlmError(
                f"action space of '{self.robot}': names, units, low and high differ in length: {lengths}"
            )
        if bool(self.kinds) != (self.kind == "per_dimension") or len(self.kinds) not in (0, self.dim):
            raise BlmError(
                f"action space of '{self.robot}': kind is '{shorten(self.kind, 40)}' with {len(self.kinds)} "
                f"kinds of dimensions; give 'per_dimension' with {self.dim} kinds, or another kind with none"
            )
        for kind in self.kinds:
            lookup("action kind", kind, dict.fromkeys(ACTION_KINDS))

    @property
    def dim(self) -> int:
        """D: arm joints and gripper."""
        return len(self.names)

    @property
    def dimension_kinds(self) -> tuple[ActionKind, ...]:
        """The kind of each dimension, also where `kind` states one for all joints."""
        if self.kinds:
            return self.kinds
        joint: ActionKind = "unknown" if self.kind == "unknown" else "absolute_joint_position"
        return (*(joint,) * (self.dim - 1), "gripper")

    @property
    def offsets_allowed(self) -> tuple[bool, ...]:
        """For each dimension, whether a target can be stated as its difference from the state.

        That holds for absolute positions. Deltas and velocities are differences already, rotations
        do not subtract, and grippers are absolute by convention. Joints of an unknown kind are
        treated as absolute positions.
        """
        absolute = ("absolute_joint_position", "absolute_eef_position", "unknown")
        return tuple(kind in absolute for kind in self.dimension_kinds)

    def to_json(self) -> dict[str, Any]:
        """Return the fields; `kinds` only if it states any, as in older files."""
        return {name: value for name, value in asdict(self).items() if name != "kinds" or value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ActionSpace:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**fields)

    def require_same(self, other: ActionSpace, where: str) -> None:
        """Raise ContractError, with both sides, unless `other` equals this action space."""
        if self != other:
            rows = [
                f"  {name}: {mine!r} here, {theirs!r} in {where}"
                for (name, mine), theirs in zip(asdict(self).items(), asdict(other).values(), strict=True)
                if mine != theirs
            ]
            raise ContractError(f"action spaces of '{self.robot}' differ:\n" + "\n".join(rows))

    def check_state(self, state: FloatArray, where: str) -> FloatArray:
        """Return `state` as float32 [D]. Raises ContractError for a wrong shape or NaN or infinity."""
        array = as_float32(state, f"{where}: state")
        if array.shape != (self.dim,):
            raise ContractError(
                f"{where}: state has shape {array.shape}, '{self.robot}' needs ({self.dim},): "
                f"{', '.join(self.names)}"
            )
        if not np.isfinite(array).all():
            bad = [n for n, ok in zip(self.names, np.isfinite(array), strict=True) if not ok]
            raise ContractError(
                f"{where}: state is not finite in {', '.join(bad)}; drop or repair this frame"
            )
        return array
