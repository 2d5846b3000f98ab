"""The mapping of a LeRobotDataset: what its columns and cameras mean, and in which units they are.

A mapping is a JSON file. `blm doctor DATASET --suggest` proposes one; training stores it with the
checkpoint. Reading through a mapping gives SI units, gripper openings, and square pictures. Shape
legend: N frames, S dimensions of the state, D of the action.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from blm.action_space import ACTION_KINDS, ROTATION_FORMS, RotationForm, StateSpace
from blm.io import read_json, reading, write_text
from blm.pictures import PICTURE_FITS
from blm.types import ActionKind, ActionSpace, BlmError, FloatArray, PictureFit, lookup, require_numbers

FORMAT = 1
UNITS: dict[str, tuple[str, float]] = {
    "rad": ("rad", 1.0),
    "deg": ("rad", math.pi / 180),
    "ticks": ("rad", 2 * math.pi / 4096),
    "m": ("m", 1.0),
    "cm": ("m", 0.01),
    "mm": ("m", 0.001),
    "rad/s": ("rad/s", 1.0),
    "deg/s": ("rad/s", math.pi / 180),
    "m/s": ("m/s", 1.0),
    "percent": ("fraction", 0.01),
    "opening": ("opening", 1.0),
    "none": ("none", 1.0),
    "unknown": ("unknown", 1.0),
}
"""Unit in the dataset -> unit that the policy sees, and its factor. "ticks" are 1/4096 of a turn;
"percent" is LeRobot's -100..100 of a joint's calibrated range."""
Clock = Literal["timestamps", "frame_index"]
"""What tells the time of a frame. "frame_index": the frames are evenly spaced, whatever the time
stamps say."""
CLOCKS: tuple[str, ...] = get_args(Clock)
ABSOLUTE: tuple[ActionKind, ...] = ("absolute_joint_position", "absolute_eef_position", "unknown")
"""Kinds whose targets may be stated relative to the state."""


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One number of the state or of the action, and where the dataset keeps it."""

    name: str
    feature: str
    """Column of the data files."""
    index: int = 0
    """Place in the column."""
    kind: ActionKind = "unknown"
    unit: str = "unknown"
    """Unit in the dataset: one of `UNITS`."""
    zero: float = 0.0
    """Value in the dataset that means 0; of a gripper: closed."""
    one: float | None = None
    """Of a gripper: value in the dataset that means open."""
    low: float | None = None
    """Lower limit of the robot, in the unit that the policy sees; None: not known."""
    high: float | None = None
    origin: str = ""
    """Of an absolute action: the dimension of the state that measures the same quantity."""

    def __post_init__(self) -> None:
        lookup(f"kind of '{self.name}'", self.kind, dict.fromkeys(ACTION_KINDS))
        lookup(f"unit of '{self.name}'", self.unit, UNITS)
        if self.index < 0:
            raise BlmError(f"'{self.name}': index is {self.index}; it must be 0 or more")
        if (self.kind == "gripper") != (self.unit == "opening"):
            raise BlmError(
                f"'{self.name}' has kind '{self.kind}' and unit '{self.unit}'; a gripper, and only a "
                "gripper, has the unit 'opening', with 'zero' (closed) and 'one' (open)"
            )
        if self.kind == "gripper" and self.one in (None, self.zero):
            raise BlmError(
                f"gripper '{self.name}': 'zero' (closed) is {self.zero}, 'one' (open) is {self.one}; "
                "they must be two different numbers of the dataset"
            )
        low, high = self.limits
        if not low < high:
            raise BlmError(f"'{self.name}': low is {self.low}, high is {self.high}; low must be below high")

    @property
    def scale(self) -> float:
        """Factor from the dataset to the policy."""
        if self.kind == "gripper":
            assert self.one is not None
            return 1 / (self.one - self.zero)
        return UNITS[self.unit][1]

    @property
    def limits(self) -> tuple[float, float]:
        """Limits, infinite where none is stated; a gripper opens from 0 to 1."""
        bounds = (0.0, 1.0) if self.kind == "gripper" else (-math.inf, math.inf)
        low, high = (
            bound if one is None else float(one)
            for one, bound in zip((self.low, self.high), bounds, strict=True)
        )
        return low, high

    def to_json(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, and the place."""
        kept = ("name", "feature", "index", "kind", "unit")
        default = {one.name: one.default for one in fields(self)}
        return {k: v for k, v in asdict(self).items() if k in kept or v != default[k]}


@dataclass(frozen=True, kw_only=True)
class DataMapping:
    """What a dataset's columns and cameras mean."""

    robot: str
    rate_hz: float
    cameras: Mapping[str, str]
    """Camera of the policy -> feature."""
    state: tuple[Dimension, ...]
    action: tuple[Dimension, ...]
    picture_fit: PictureFit = "exact"
    image_size: int | None = None
    """Side of the squares that pictures become [px]; None with the fit "exact"."""
    state_rotation: RotationForm = "none"
    action_rotation: RotationForm = "none"
    clock: Clock = "timestamps"
    instruction: str | None = None
    """Instruction of all episodes; None: those of the dataset."""
    instruction_column: str = "task_index"
    """Column with the number of the instruction in meta/tasks, or with the instruction itself."""

    def __post_init__(self) -> None:
        lookup("picture_fit", self.picture_fit, dict.fromkeys(PICTURE_FITS))
        lookup("clock", self.clock, dict.fromkeys(CLOCKS))
        for form in (self.state_rotation, self.action_rotation):
            lookup("rotation form", form, dict.fromkeys(ROTATION_FORMS))
        require_numbers(self, rate_hz=(1e-3, 1e6), image_size=(8, 4096))
        if (self.image_size is None) != (self.picture_fit == "exact"):
            raise BlmError(
                f"picture_fit is '{self.picture_fit}' with image_size {self.image_size}; letterbox and "
                "crop need a size, and 'exact' takes that of the pictures"
            )
        if not self.action:
            raise BlmError("the mapping has no dimension of the action; name at least one")
        states = [one.name for one in self.state]
        for names in (states, [one.name for one in self.action]):
            if len({*names}) != len(names):
                raise BlmError(f"dimensions of the mapping have the names {', '.join(names)}; each only once")
        for one in self.action:
            if one.origin and (one.origin not in states or one.kind not in ABSOLUTE):
                raise BlmError(
                    f"action '{one.name}' of kind '{one.kind}' has the origin '{one.origin}'; only an "
                    f"absolute position has one, and it must be a state: {', '.join(states) or 'none'}"
                )

    @property
    def features(self) -> tuple[str, ...]:
        """Columns of the vectors."""
        return tuple(dict.fromkeys(one.feature for one in (*self.state, *self.action)))

    @property
    def undecided(self) -> tuple[str, ...]:
        """Names of the dimensions of the action whose kind is unknown."""
        return tuple(one.name for one in self.action if one.kind == "unknown")

    def read(self, columns: Mapping[str, NDArray[Any]]) -> tuple[FloatArray, FloatArray]:
        """Return states [N, S] and actions [N, D], float32, of columns [N, k].

        Raises BlmError for a place that a column does not have.
        """
        count = len(next(iter(columns.values())))
        return _gather(self.state, columns, count), _gather(self.action, columns, count)

    def to_stored(self, actions: FloatArray) -> FloatArray:
        """Return actions [.., D] of the policy in the units of the dataset, in the order of `action`."""
        scale, zero = (np.array([getattr(d, name) for d in self.action]) for name in ("scale", "zero"))
        return np.asarray(actions, np.float64) / scale + zero

    def action_space(self) -> ActionSpace:
        """Return the action space that the policy has, with the state where it differs."""
        kinds = tuple(one.kind for one in self.action)
        units, state_units = ([UNITS[one.unit][0] for one in part] for part in (self.action, self.state))
        low, high = zip(*(one.limits for one in self.action), strict=True)
        joints = (*("absolute_joint_position",) * (len(kinds) - 1), "gripper")
        values: dict[str, Any] = {"kind": "per_dimension", "kinds": kinds}
        if set(kinds) == {"unknown"}:
            values = {"kind": "unknown"}
        elif kinds == joints and units == ["rad"] * (len(kinds) - 1) + ["opening"]:
            values = {"kind": "absolute_joint_position"}
        return ActionSpace(
            robot=self.robot,
            names=tuple(one.name for one in self.action),
            units=tuple(units),
            low=low,
            high=high,
            rate_hz=self.rate_hz,
            rotation=self.action_rotation,
            state=self._state_space(state_units),
            **values,
        )

    def _state_space(self, units: Sequence[str]) -> StateSpace | None:
        """Return the state if it is not simply that of the actions."""
        names = [one.name for one in self.state]
        origins = tuple(names.index(one.origin) if one.origin else -1 for one in self.action)
        same = len(self.state) == len(self.action) and all(
            (s.name, s.kind, UNITS[s.unit]) == (a.name, a.kind, UNITS[a.unit])
            and a.origin == (s.name if a.kind in ABSOLUTE else "")
            for s, a in zip(self.state, self.action, strict=True)
        )
        if same and self.state_rotation == self.action_rotation:
            return None
        return StateSpace(
            names=tuple(names),
            units=tuple(units),
            kinds=tuple(one.kind for one in self.state),
            origins=origins,
            rotation=self.state_rotation,
        )

    def without_meaning(self) -> DataMapping:
        """Return the same columns and cameras with unknown kinds and units, and pictures as they are."""

        def bare(one: Dimension, origin: str) -> Dimension:
            return Dimension(name=one.name, feature=one.feature, index=one.index, origin=origin)

        state = tuple(bare(one, "") for one in self.state)
        alike = len(self.state) == len(self.action)
        if alike:  # as in most datasets, in which both have the same names
            state = tuple(replace(s, name=a.name) for s, a in zip(state, self.action, strict=True))
        action = tuple(bare(one, one.name if alike else "") for one in self.action)
        return DataMapping(
            robot=self.robot, rate_hz=self.rate_hz, cameras=self.cameras, state=state, action=action
        )

    def to_json(self) -> dict[str, Any]:
        parts = {part: [one.to_json() for one in getattr(self, part)] for part in ("state", "action")}
        return {"format": FORMAT, **asdict(self), "cameras": dict(self.cameras), **parts}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DataMapping:
        """Return the mapping of a file's content. Raises BlmError that names a wrong key or value."""
        if value.get("format") != FORMAT:
            raise BlmError(f"a mapping has 'format': {FORMAT}; this one has {value.get('format')!r}")
        given = {name: one for name, one in value.items() if name != "format"}
        _require_keys(cls, given, "mapping")
        for part in ("state", "action"):
            for one in given[part]:
                _require_keys(Dimension, one, f"dimension {one.get('name', '')!r} of the {part}")
            given[part] = tuple(Dimension(**one) for one in given[part])
        return cls(**given)

    @property
    def sha256(self) -> str:
        """Hash of everything that the mapping states."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def read_mapping(path: Path) -> DataMapping:
    """Read a mapping. Raises BlmError that names file and fault."""
    value = read_json(path)
    with reading(path):
        try:
            return DataMapping.from_json(value)
        except BlmError as error:
            raise BlmError(f"mapping '{path}': {error}") from error


def write_mapping(path: Path, mapping: DataMapping) -> None:
    """Write a mapping with one line for each dimension, so that people can edit it."""
    value = mapping.to_json()
    lines = []
    for name, part in value.items():
        if name in ("state", "action"):
            rows = ",\n".join(f"    {json.dumps(one)}" for one in part)
            lines.append(f'  "{name}": [\n{rows}\n  ]' if part else f'  "{name}": []')
        else:
            lines.append(f'  "{name}": {json.dumps(part)}')
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def mappings_for(folders: Sequence[Path], paths: Sequence[Path]) -> tuple[DataMapping | None, ...]:
    """Return the mapping of each dataset: one file for all of them, one for each, or none.

    "-" stands for a dataset without a mapping. Raises BlmError for another number of files.
    """
    if not paths:
        return (None,) * len(folders)
    if len(paths) not in (1, len(folders)):
        raise BlmError(
            f"{len(paths)} mappings for {len(folders)} datasets; give one for all, or one for each "
            "('-': none)"
        )
    found = [None if path == Path("-") else read_mapping(path) for path in paths]
    return tuple(found * len(folders) if len(found) == 1 else found)


def _require_keys(kind: type, value: Mapping[str, Any], what: str) -> None:
    valid = {one.name for one in fields(kind)}
    missing = {one.name for one in fields(kind) if one.default is MISSING} - {*value}
    if unknown := sorted({*value} - valid):
        lookup(f"key of the {what}", unknown[0], dict.fromkeys(sorted(valid)))
    if missing:
        raise BlmError(f"the {what} lacks {', '.join(sorted(missing))}")


def _gather(dimensions: Sequence[Dimension], columns: Mapping[str, NDArray[Any]], count: int) -> FloatArray:
    """Return [N, dimensions] in the units of the policy."""
    values = np.empty((count, len(dimensions)), np.float32)
    for place, one in enumerate(dimensions):
        column = columns[one.feature].reshape(count, -1)
        if one.index >= column.shape[1]:
            raise BlmError(
                f"'{one.name}' of the mapping is number {one.index} of '{one.feature}', which has "
                f"{column.shape[1]} (0..{column.shape[1] - 1})"
            )
        stored = column[:, one.index]
        plain = one.scale == 1 and one.zero == 0
        values[:, place] = stored if plain else (stored.astype(np.float64) - one.zero) * one.scale
    return values
