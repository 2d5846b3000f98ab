"""`ActionSpace`: names, units, limits and kinds of the dimensions of a robot's actions."""

from __future__ import annotations

import math
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
    "base_velocity",
    "gripper",
    "other",
    "unknown",
]
"""Kind of a dimension. "eef" is the end effector, in the robot's base frame; a delta is relative to
the state at its control step; "base_velocity" is of a mobile base; "gripper" is an absolute opening;
"other" is a number without a unit, such as a mode, that is learned as it is."""
ACTION_KINDS: tuple[str, ...] = get_args(ActionKind)
RotationForm = Literal[
    "none", "euler_xyz", "rotation_vector", "quaternion_wxyz", "quaternion_xyzw", "matrix_6d"
]
"""Form of the dimensions of kind "..._eef_rotation"; "matrix_6d" is two columns of the matrix."""
ROTATION_FORMS: tuple[str, ...] = get_args(RotationForm)


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
class StateSpace:
    """The meaning of a robot's state where it differs from that of its actions."""

    names: tuple[str, ...]
    """[S] one per dimension of the state."""
    units: tuple[str, ...]
    kinds: tuple[ActionKind, ...]
    origins: tuple[int, ...]
    """[D] for each dimension of the action, the dimension of the state that measures the same
    quantity; -1 if there is none."""
    rotation: RotationForm = "none"

    def __post_init__(self) -> None:
        lengths = {len(self.names), len(self.units), len(self.kinds)}
        if len(lengths) != 1 or not all(-1 <= place < len(self.names) for place in self.origins):
            raise BlmError(
                f"state space: names, units and kinds have the lengths {lengths}, which must be equal, "
                f"and the origins {self.origins} must be dimensions of the state, or -1"
            )
        for kind in self.kinds:
            lookup("kind of a state", kind, dict.fromkeys(ACTION_KINDS))
        lookup("rotation form", self.rotation, dict.fromkeys(ROTATION_FORMS))


@dataclass(frozen=True, kw_only=True)
class ActionSpace:
    """The meaning of a robot's actions, by default absolute joint-position targets, then the gripper
    opening.

    State vectors use the same order, names and units, unless `state` says otherwise: by default
    joint positions, then the measured gripper opening.
    """

    robot: str
    names: tuple[str, ...]
    """One per dimension; the last is 'gripper' unless `kinds` says otherwise."""
    units: tuple[str, ...]
    """'rad' for joints, 'opening' (0 closed .. 1 open) for the gripper, 'm' for positions of the
    end effector, 'rad/s' for velocities."""
    low: tuple[float, ...]
    """Lower limits of the robot; -infinity where nobody stated one."""
    high: tuple[float, ...]
    rate_hz: float = 20.0
    kind: Literal["absolute_joint_position", "per_dimension", "unknown"] = "absolute_joint_position"
    """"per_dimension" if `kinds` states them; "unknown" in datasets of other programs, which do not
    state it."""
    kinds: tuple[ActionKind, ...] = ()
    """One per dimension if `kind` is "per_dimension", and otherwise empty."""
    rotation: RotationForm = "none"
    """Form of the rotations among the dimensions."""
    state: StateSpace | None = None
    """None: states have the dimensions of the actions."""

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
        lookup("rotation form", self.rotation, dict.fromkeys(ROTATION_FORMS))
        if self.state is not None and len(self.state.origins) != self.dim:
            raise BlmError(
                f"action space of '{self.robot}': {len(self.state.origins)} origins in the state for "
                f"{self.dim} dimensions of the action"
            )

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

        That holds for absolute positions that the state measures, too. Deltas and velocities are
        differences already, rotations do not subtract, and grippers are absolute by convention.
        Joints of an unknown kind are treated as absolute positions.
        """
        absolute = ("absolute_joint_position", "absolute_eef_position", "unknown")
        pairs = zip(self.dimension_kinds, self.origins, strict=True)
        return tuple(kind in absolute and origin >= 0 for kind, origin in pairs)

    @property
    def state_dim(self) -> int:
        """S: length of the state."""
        return len(self.state_names)

    @property
    def state_names(self) -> tuple[str, ...]:
        return self.names if self.state is None else self.state.names

    @property
    def state_units(self) -> tuple[str, ...]:
        return self.units if self.state is None else self.state.units

    @property
    def state_kinds(self) -> tuple[ActionKind, ...]:
        return self.dimension_kinds if self.state is None else self.state.kinds

    @property
    def origins(self) -> tuple[int, ...]:
        """[D] the dimension of the state that measures the same as each dimension of the action; -1
        if there is none."""
        return tuple(range(self.dim)) if self.state is None else self.state.origins

    def middle_state(self) -> FloatArray:
        """Return a valid state [S]: the middle of each range, and 0 where a range is not known."""
        low, high = np.array(self.low), np.array(self.high)
        bounded = np.isfinite(low) & np.isfinite(high)
        state = np.zeros(self.state_dim, np.float32)
        for place, origin in enumerate(self.origins):
            if origin >= 0 and bounded[place]:
                state[origin] = (low[place] + high[place]) / 2
        return state

    def to_json(self) -> dict[str, Any]:
        """Return the fields; later ones only if they state anything, as in older files. A missing
        limit is null."""
        fields = asdict(self)
        for name in ("low", "high"):
            fields[name] = tuple(one if math.isfinite(one) else None for one in fields[name])
        unstated = {"kinds": (), "rotation": "none", "state": None}
        return {
            name: value for name, value in fields.items() if name not in unstated or value != unstated[name]
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ActionSpace:
        fields = _with_tuples(data)
        for name, limit in (("low", -math.inf), ("high", math.inf)):
            fields[name] = tuple(limit if one is None else one for one in fields[name])
        if fields.get("state") is not None:
            fields["state"] = StateSpace(**_with_tuples(fields["state"]))
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
        if array.shape != (self.state_dim,):
            raise ContractError(
                f"{where}: state has shape {array.shape}, '{self.robot}' needs ({self.state_dim},): "
                f"{', '.join(self.state_names)}"
            )
        if not np.isfinite(array).all():
            bad = [n for n, ok in zip(self.state_names, np.isfinite(array), strict=True) if not ok]
            raise ContractError(
                f"{where}: state is not finite in {', '.join(bad)}; drop or repair this frame"
            )
        return array


def _with_tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
