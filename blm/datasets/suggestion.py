"""A proposed mapping of a dataset: kinds, units and rotations from names, GR00T's groups and values.

What values alone cannot tell is a note for the user to check. Shape legend: N frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blm.datasets.commands import DELTAS, Signals, decided_actions, states_of
from blm.datasets.dataset import EpisodeDataset
from blm.datasets.lerobot_columns import (
    bare_mapping,
    features_of,
    matrix,
    read_modality,
    short_names,
    slices_of,
)
from blm.datasets.lerobot_foreign import load_foreign
from blm.datasets.lerobot_layouts import data_files
from blm.datasets.mapping import DataMapping, Dimension
from blm.datasets.meaning import (
    NUMBERED,
    is_gripper,
    kind_of_name,
    rotation_form,
    suggested_gripper,
    with_units,
)
from blm.io import read_json, reading
from blm.types import BlmError, FloatArray, PictureFit

SAMPLED_FILES = 40
"""Maximum number of data files whose values are looked at."""
MAX_SQUARE = 512
"""Largest side of square pictures that are proposed as they are [px]."""
DEFAULT_SIDE = 224
"""Side that other pictures are scaled to [px]."""
JITTER = 0.1
"""Error of a time stamp, as a fraction of a step, from which the frame index is proposed."""


@dataclass(frozen=True)
class Suggestion:
    """A mapping, and what the user should check in it."""

    mapping: DataMapping
    notes: tuple[str, ...]


def suggest_mapping(folder: Path, fit: PictureFit = "letterbox", image_size: int | None = None) -> Suggestion:
    """Return a mapping of a LeRobotDataset of another program.

    `fit` and `image_size` are for pictures that are not squares. Raises BlmError if there is no
    action, or if a file is damaged.
    """
    info = read_json(folder / "meta/info.json")
    if "blm" in info:
        raise BlmError(
            f"'{folder}' is a dataset of this program, which states everything; it needs no mapping"
        )
    notes, bare = list[str](), bare_mapping(folder, info)
    columns = _sample(folder, bare)
    signals, modality = _signals(bare, columns), read_modality(folder)
    actions = {one.name: values for one, values in zip(bare.action, signals.action, strict=True)}
    states = {one.name: values for one, values in zip(bare.state, signals.state, strict=True)}
    action = _named(bare.action, _with_twins(actions, states), modality.get("action"), notes)
    state = _named(bare.state, _with_twins(states, actions), modality.get("state"), notes)
    action = decided_actions(action, state, signals, notes)
    state = states_of(state, action)
    largest = dict[str, float]()
    for one, values in zip((*state, *action), (*signals.state, *signals.action), strict=True):
        largest[one.kind] = _larger(largest.get(one.kind), values)
    state, action = with_units(state, largest, notes), with_units(action, largest, notes)
    data, column = _open(folder, info, bare, notes)
    if not info.get("robot_type"):
        notes.append(f"the dataset names no robot: '{folder.resolve().name}' is taken, from its folder")
    mapping = replace(
        bare,
        robot=str(info.get("robot_type") or folder.resolve().name),
        state=state,
        action=action,
        state_rotation=rotation_form(state),
        action_rotation=rotation_form(action),
        cameras=short_names(bare.cameras.values()),
        clock=_clock(columns, bare.rate_hz, notes),
        instruction_column=column or bare.instruction_column,
        instruction=None if column else "",
        **_squares({*data.stored_shapes.values()}, fit, image_size),
    )
    if not state:
        notes.append("no state was found: the policy sees pictures and text only")
    if mapping.undecided:
        notes.append(
            f"state the kind of {', '.join(mapping.undecided)}: neither names nor values tell it, and "
            "training refuses 'unknown'"
        )
    return Suggestion(mapping, tuple(dict.fromkeys(notes)))


def _with_twins(values: Mapping[str, FloatArray], others: Mapping[str, FloatArray]) -> tuple[FloatArray, ...]:
    """Return the values of each dimension, with those of its namesake if they are of one range."""
    found = []
    for name, own in values.items():
        twin = others.get(name, own)
        alike = 0.5 * np.ptp(own) <= np.ptp(twin) <= 2 * np.ptp(own)
        found.append(np.concatenate([own, twin]) if alike else own)
    return tuple(found)


def _larger(signed: float | None, values: FloatArray) -> float:
    """Return the largest absolute value so far; negative while all values are whole numbers."""
    whole = (signed is None or signed < 0) and bool((values == np.round(values)).all())
    most = max(abs(signed or 0.0), float(np.abs(values).max()))
    return -most if whole else most


def _sample(folder: Path, mapping: DataMapping) -> dict[str, NDArray[Any]]:
    """Return the columns of some data files, evenly spaced."""
    files = data_files(folder)
    if not files:
        raise BlmError(f"'{folder}' has no data files (data/**/*.parquet); download it again")
    chosen = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, SAMPLED_FILES).astype(int))]
    wanted = {*mapping.features, "timestamp", "episode_index", "frame_index"}
    parts = []
    for path in chosen:
        with reading(path):
            table = pq.read_table(path, columns=sorted(wanted & {*pq.read_schema(path).names}))
            parts.append({name: matrix(table[name]) for name in table.column_names})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _signals(mapping: DataMapping, columns: Mapping[str, NDArray[Any]]) -> Signals:
    def values(one: Dimension) -> FloatArray:
        if one.feature not in columns:
            raise BlmError(f"the data files lack '{one.feature}'")
        column = columns[one.feature].reshape(len(columns[one.feature]), -1)
        if one.index >= column.shape[1]:
            raise BlmError(
                f"'{one.feature}' is said to have {one.index + 1} numbers or more, it has {column.shape[1]}"
            )
        return column[:, one.index].astype(np.float64)

    count = len(columns[mapping.action[0].feature])
    episode = columns.get("episode_index", np.zeros(count)).reshape(-1)
    return Signals(
        tuple(values(one) for one in mapping.state),
        tuple(values(one) for one in mapping.action),
        np.diff(episode) == 0,
    )


def _named(
    part: Sequence[Dimension], values: Sequence[FloatArray], groups: Any, notes: list[str]
) -> tuple[Dimension, ...]:
    """Return the dimensions with the kinds that their names or GR00T's groups tell; without any, the
    last is taken for the gripper."""
    found = list[Dimension]()
    part = [replace(one, origin="") for one in part]
    for one, value in zip(part, values, strict=True):
        slices = slices_of(groups, one.feature)
        group = next((name for name, (first, end) in slices.items() if first <= one.index < end), "")
        first, end = slices.get(group, (0, 0))
        kind = kind_of_name(one.name, group, alone=end - first == 1)
        if group and groups[group].get("absolute") is False:
            kind = DELTAS.get(kind, kind)
        found.append(replace(one, kind=kind) if kind != "gripper" else suggested_gripper(one, value, notes))
    if part and not groups and all(NUMBERED.fullmatch(one.name) for one in part):
        found = list(part)
        if len(part) > 2 and is_gripper(values[-1]):
            notes.append(f"the last number of {part[-1].feature} is taken for the gripper: none has a name")
            found[-1] = suggested_gripper(part[-1], values[-1], notes)
    return tuple(found)


def _open(
    folder: Path, info: Mapping[str, Any], bare: DataMapping, notes: list[str]
) -> tuple[EpisodeDataset, str]:
    """Return the dataset, and the column of its instructions; empty if it states none."""
    features = features_of(folder, info)
    annotated = [name for name in features if name.startswith("annotation.") and "description" in name]
    texts = [
        name for name, one in features.items() if str(one["dtype"]) == "string" and "instruction" in name
    ]
    even = replace(bare, clock="frame_index")
    for column in ("task_index", *annotated, *texts):
        try:
            data = load_foreign(folder, info, replace(even, instruction_column=column))
        except BlmError:
            continue  # another column may state them; a damaged file is reported below
        if any(text.strip() for text in data.instructions):
            return data, column
    notes.append('the dataset states no instruction: write what the robot does into "instruction"')
    return load_foreign(folder, info, replace(even, instruction="")), ""


def _squares(shapes: set[tuple[int, int]], fit: PictureFit, image_size: int | None) -> dict[str, Any]:
    """Return how pictures become squares; squares of one size stay as they are."""
    sides = {side for shape in shapes for side in shape}
    if image_size is None and (not sides or (len(sides) == 1 and max(sides) <= MAX_SQUARE)):
        return {}
    side = image_size or min(DEFAULT_SIDE, max(sides, default=DEFAULT_SIDE))
    return {"picture_fit": fit if fit != "exact" else "letterbox", "image_size": side}


def _clock(columns: Mapping[str, NDArray[Any]], rate_hz: float, notes: list[str]) -> Any:
    """Return "frame_index" if the time stamps are not those of the rate."""
    if "timestamp" not in columns or "frame_index" not in columns:
        return "timestamps"
    off = np.abs(columns["timestamp"].reshape(-1) * rate_hz - columns["frame_index"].reshape(-1))
    if not (off > JITTER).any():
        return "timestamps"
    notes.append(
        f"time stamps are up to {off.max() / rate_hz:.3g} s off {rate_hz:g} Hz: frames are taken to be "
        'evenly spaced ("clock": "frame_index")'
    )
    return "frame_index"
