"""Which columns and cameras of a LeRobotDataset hold state, action and pictures, and their names.

Features are found by the names that LeRobot, openpi and GR00T use. Their meaning is not judged here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blm.datasets.lerobot_layouts import data_files
from blm.datasets.mapping import DataMapping, Dimension
from blm.io import read_json, reading
from blm.types import BlmError

STATES = (
    "observation.state",
    "state",
    "observation.states",
    "observation.qpos",
    "qpos",
    "observation.joint_positions",
    "observation.joint_position",
    "joint_positions",
    "joint_position",
)
ACTIONS = ("action", "actions", "observation.action")
PARTS = {"state": ("observation.state.", "state."), "action": ("action.", "actions.")}
"""Prefixes of features that hold parts of the state or action."""
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
Features = dict[str, Mapping[str, Any]]


def features_of(folder: Path, info: Mapping[str, Any]) -> Features:
    """Return feature -> description, also of nested ones, or from the data files if there are none."""
    found = dict(_flat(info.get("features") or {}))
    files = data_files(folder)
    if found or not files:
        return found
    with reading(files[0]):
        return {one.name: _described(one.type) for one in pq.read_schema(files[0])}


def _flat(features: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, value in features.items():
        if isinstance(value, Mapping) and "dtype" in value:
            yield prefix + name, value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")


def _described(kind: pa.DataType) -> dict[str, Any]:
    """Return the description of a column that info.json lacks."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return {"dtype": "image", "shape": None, "names": None}
    size = kind.list_size if pa.types.is_fixed_size_list(kind) else None
    inner = kind.value_type if pa.types.is_nested(kind) and not pa.types.is_struct(kind) else kind
    return {
        "dtype": str(inner).replace("float", "float32").replace("double", "float64"),
        "shape": size and [size],
    }


def is_vector(feature: Mapping[str, Any]) -> bool:
    """Return whether a feature holds numbers."""
    return str(feature["dtype"]).startswith(("float", "int", "uint", "bool"))


def is_camera(name: str, feature: Mapping[str, Any]) -> bool:
    """Return whether a feature holds colour pictures; depth maps do not count."""
    about = feature.get("info") or feature.get("video_info") or {}
    shape = list(feature.get("shape") or ())
    is_depth = about.get("video.is_depth_map") or (len(shape) == 3 and 3 not in (shape[0], shape[2]))
    return feature["dtype"] in ("video", "image") and not is_depth and "depth" not in name.lower()


def short_names(features: Iterable[str]) -> dict[str, str]:
    """Return camera -> feature, with names such as "top" for "observation.images.top"."""
    cameras = dict[str, str]()
    for feature in features:
        name = feature
        for prefix in ("observation.images.", "observation.image.", "images.", "observation."):
            if feature.startswith(prefix):
                name = feature.removeprefix(prefix)
                break
        cameras[feature if name in cameras else name] = feature
    return cameras


def read_modality(folder: Path) -> Mapping[str, Any]:
    """Return GR00T's meta/modality.json; {} if there is none."""
    path = folder / "meta/modality.json"
    found = read_json(path) if path.exists() else {}
    return found if isinstance(found, dict) else {}


def bare_mapping(folder: Path, info: Mapping[str, Any]) -> DataMapping:
    """Return the columns and cameras that are found, with unknown kinds and units.

    Raises BlmError, which lists the features, if there is no action.
    """
    features, modality = features_of(folder, info), read_modality(folder)
    action = _dimensions(folder, "action", features, modality)
    if not action:
        vectors = [name for name, one in features.items() if is_vector(one) and name not in BOOKKEEPING]
        raise BlmError(
            f"'{folder}' lacks an action under the names {', '.join(ACTIONS)}; its numbers are "
            f"{', '.join(vectors) or 'none'}: name its dimensions in a mapping (docs/datasets.md)"
        )
    return DataMapping(
        robot=str(info.get("robot_type") or "unknown"),
        rate_hz=_rate(folder, info),
        cameras={
            name.removeprefix("observation.images."): name
            for name, feature in features.items()
            if is_camera(name, feature)
        },
        state=_dimensions(folder, "state", features, modality),
        action=action,
    ).without_meaning()


def _rate(folder: Path, info: Mapping[str, Any]) -> float:
    """Return the rate that is stated, or that of the time stamps [Hz]."""
    if info.get("fps"):
        return float(info["fps"])
    files = data_files(folder)
    with reading(folder / "meta/info.json"):
        stamps = pq.read_table(files[0], columns=["timestamp"])["timestamp"].to_numpy() if files else []
        step = float(np.median(np.diff(stamps))) if len(stamps) > 1 else 0.0
    if not step > 0:
        raise BlmError(f"'{folder}/meta/info.json' states no fps, and no time stamps tell it; add \"fps\"")
    return round(1 / step, 3)


def _dimensions(
    folder: Path, part: str, features: Features, modality: Mapping[str, Any]
) -> tuple[Dimension, ...]:
    chosen = _chosen(part, features)
    found = list[Dimension]()
    for feature in chosen:
        size = _size(folder, feature, features[feature])
        names = names_of(features[feature], size) or _names_of_groups(modality.get(part), feature, size)
        prefix = feature.removeprefix(next((p for p in PARTS[part] if feature.startswith(p)), feature))
        for index in range(size):
            name = names[index] if names else (str(index) if len(chosen) == 1 else f"{prefix}.{index}")
            if not names and len(chosen) > 1 and size == 1:
                name = prefix
            found.append(Dimension(name=name, feature=feature, index=index))
    if len({one.name for one in found}) == len(found):
        return tuple(found)
    return tuple(
        Dimension(name=f"{one.feature}.{one.name}.{one.index}", feature=one.feature, index=one.index)
        for one in found
    )


def _chosen(part: str, features: Features) -> list[str]:
    """Return the features of a state or action: one by its name, or all that begin like it."""
    vectors = [name for name, one in features.items() if is_vector(one)]
    for name in STATES if part == "state" else ACTIONS:
        if name in vectors:
            return [name]
    for prefix in PARTS[part]:
        if found := [name for name in vectors if name.startswith(prefix)]:
            return found
    return []


def _size(folder: Path, name: str, feature: Mapping[str, Any]) -> int:
    """Return the length of a feature, from its column if its description does not tell."""
    shape = feature.get("shape")
    if isinstance(shape, Sequence) and not isinstance(shape, str):
        return math.prod(int(side) for side in shape)
    for path in data_files(folder)[:1]:
        with reading(path):
            row = pq.ParquetFile(path).read_row_group(0, columns=[name]).slice(0, 1)
            return int(matrix(row[name]).size)
    return 1


def names_of(feature: Mapping[str, Any], size: int) -> list[str]:
    """Return the names of `size` dimensions in any of their usual forms; [] if there are not as many.

    Forms: a list, {"motors": [..]}, {name: place}, several lists in groups, lists of lists.
    """
    names: Any = feature.get("names")
    if isinstance(names, Mapping):
        places = [value for value in names.values() if isinstance(value, int | str)]
        if len(places) == len(names) == size and sorted(map(str, places)) == sorted(map(str, range(size))):
            return sorted(map(str, names), key=lambda name: int(names[name]))
        grouped = [value for value in names.values() if isinstance(value, list)]
        if len(grouped) > 1:
            short = [name for group in grouped for name in _flat_names(group)]
            long = [f"{key}.{n}" for key, group in names.items() for n in _flat_names(group)]
            names = short if len({*short}) == len(short) else long
        else:
            names = grouped[0] if grouped else None
    found = _flat_names(names)
    return found if len(found) == size else []


def _flat_names(names: Any) -> list[str]:
    if not isinstance(names, list):
        return []
    return [text for one in names for text in (_flat_names(one) if isinstance(one, list) else [str(one)])]


def _names_of_groups(groups: Any, feature: str, size: int) -> list[str]:
    """Return names such as "left_arm.0" from GR00T's groups; [] unless they cover the feature."""
    names = [""] * size
    for group, (start, end) in slices_of(groups, feature).items():
        for place in range(start, min(end, size)):
            names[place] = group if end - start == 1 else f"{group}.{place - start}"
    return names if all(names) else []


def slices_of(groups: Any, feature: str) -> dict[str, tuple[int, int]]:
    """Return group -> first place and end of GR00T's groups in a feature."""
    found = dict[str, tuple[int, int]]()
    for group, one in groups.items() if isinstance(groups, Mapping) else ():
        key = one.get("original_key") if isinstance(one, Mapping) else None
        if isinstance(one, Mapping) and key in (None, feature) and {"start", "end"} <= {*one}:
            found[str(group)] = int(one["start"]), int(one["end"])
    return found


def matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return a column of numbers as [N], or of equally long lists, also nested ones, as [N, D].

    Raises ValueError if ragged.
    """
    count, shape = len(column), list[int]()
    while (
        pa.types.is_list(column.type)
        or pa.types.is_large_list(column.type)
        or (pa.types.is_fixed_size_list(column.type))
    ):
        lengths = pc.unique(pc.list_value_length(column)).to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            raise ValueError(f"lists of different lengths: {lengths}")
        shape.append(int(lengths[0]))
        column = pc.list_flatten(column)
    values: NDArray[Any] = column.to_numpy()
    return values.reshape(count, math.prod(shape)) if shape else values
