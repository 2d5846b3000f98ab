"""Policies that LeRobot trained, for our suite: what their folders say, and what a mapping adds.

LeRobot's files state the names and shapes of a policy's features, but neither the robot nor units.
Without a mapping they are taken to be those of our own datasets: `observation.state` and `action`
with joints [rad] and the gripper's opening, and `observation.images.CAMERA`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from blm.datasets.mapping import UNITS, DataMapping, Dimension, read_mapping
from blm.io import read_json, reading, sha256_file
from blm.robots import ROBOTS
from blm.serving.lerobot.features import ACTION, FeatureMap, Place
from blm.serving.lerobot.process import LeRobotProcess
from blm.tasks.scene import CAMERAS
from blm.types import ActionSpace, BlmError, FloatArray, lookup

PREFIX = "lerobot:"
PYTHON = Path(".venv-lerobot/bin/python")
"""Python of the environment that scripts/lerobot.sh creates."""
STATE = "observation.state"
PICTURES = "observation.images."
PLACES = ("", "pretrained_model", "checkpoints/last/pretrained_model")
"""Where a policy lies below a folder: `save_pretrained`, a checkpoint, or the output of `lerobot-train`."""


@dataclass(frozen=True, kw_only=True)
class LeRobotFolder:
    """What the files of a LeRobot policy say about its inputs and outputs."""

    path: Path
    kind: str
    """Type of the policy, such as 'act'."""
    pictures: Mapping[str, tuple[int, int]]
    """Feature -> height and width [px]."""
    vectors: Mapping[str, int]
    """Feature -> length, of the inputs."""
    actions: int
    """Length of the action."""
    action_range: tuple[FloatArray, FloatArray] | None = None
    """Smallest and largest action of the training data, where the files have them."""

    @property
    def revision(self) -> str:
        """Name with a hash of all files that decide what the policy does."""
        files = sorted(p for p in self.path.iterdir() if p.suffix in (".json", ".safetensors"))
        hashes = {file.name: sha256_file(file) for file in files if file.name != "train_config.json"}
        return f"lerobot {self.kind} {_digest(hashes)}"


def read_folder(path: Path) -> LeRobotFolder:
    """Read the configuration of a policy. Raises BlmError for a folder without one, or another form."""
    found = [path / place for place in PLACES if (path / place / "config.json").is_file()]
    if not found:
        raise BlmError(
            f"no LeRobot policy in '{path}': needed is a folder with config.json and model.safetensors, "
            "such as outputs/train/checkpoints/last/pretrained_model"
        )
    folder = found[0]
    config = read_json(folder / "config.json")
    with reading(folder / "config.json"):
        if not isinstance(config, dict) or "type" not in config or "input_features" not in config:
            raise BlmError(
                f"'{folder}/config.json' is not of a LeRobot policy: no 'type' or 'input_features'"
            )
        features = config["input_features"] or {}
        inputs = {name: (one["type"], tuple(one["shape"])) for name, one in features.items()}
        actions = int(config["output_features"][ACTION]["shape"][0])
    for name, (kind, _) in inputs.items():
        if kind == "ENV":
            raise BlmError(f"the policy needs '{name}', the state of its environment; the suite gives none")
    renamed, statistics = _preprocessing(folder)
    shapes = {name: shape for name, (kind, shape) in inputs.items() if kind == "VISUAL"}
    vectors = {name: int(shape[0]) for name, (kind, shape) in inputs.items() if kind == "STATE"}
    lengths = {name.rpartition(".")[0]: len(one) for name, one in statistics.items() if one.ndim == 1}
    bounds = [statistics.get(f"{ACTION}.{which}") for which in ("min", "max")]
    return LeRobotFolder(
        path=folder,
        kind=str(config["type"]),
        pictures={name: (int(s[1]), int(s[2])) for name, s in _sources(shapes, renamed).items()},
        vectors={name: lengths.get(name, length) for name, length in vectors.items()},
        actions=lengths.get(ACTION, actions),
        action_range=(bounds[0], bounds[1]) if bounds[0] is not None and bounds[1] is not None else None,
    )


def _preprocessing(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the renamed features (old -> new), and the statistics, whose lengths are those of the
    training data also where a pretrained configuration states others."""
    file = folder / "policy_preprocessor.json"
    if not file.is_file():
        raise BlmError(
            f"'{folder}' has no policy_preprocessor.json: the policy is of LeRobot before 0.4; its "
            "'python -m lerobot.processor.migrate_policy_normalization' converts it"
        )
    renamed, statistics = dict[str, str](), dict[str, Any]()
    content = read_json(file)
    with reading(file):
        for step in content["steps"]:
            if step.get("registry_name") == "rename_observations_processor":
                renamed |= step["config"].get("rename_map") or {}
            if step.get("registry_name") == "normalizer_processor" and "state_file" in step:
                statistics |= load_file(folder / Path(step["state_file"]).name)
    return renamed, statistics


def _sources(shapes: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Return the shape of each picture under the name that it has before LeRobot renames it.

    Cameras that the renaming leaves out were not there in training either.
    """
    old = {new: name for name, new in renamed.items()}
    kept = {name: shape for name, shape in shapes.items() if name in old or not {*shapes} & {*old}}
    return {old.get(name, name): shape for name, shape in kept.items() if "empty_camera" not in name}


def map_features(
    folder: LeRobotFolder, robots: Sequence[str], mapping: DataMapping | None = None
) -> FeatureMap:
    """Return how a policy's features correspond to robots of the suite.

    `robots` may be empty if a mapping names one. Raises BlmError that names what does not fit.
    """
    names = _robots(folder, robots, mapping)
    spaces = {name: lookup("robot", name, ROBOTS).action_space for name in names}
    space = spaces[names[0]]
    plain = mapping is None
    cameras = _cameras(folder, {} if mapping is None else mapping.cameras, plain)
    if mapping is None:
        state = tuple(Place(feature=STATE, index=i) for i in range(space.dim if folder.vectors else 0))
        action = tuple(Place(feature=ACTION, index=i) for i in range(space.dim))
    else:
        _require_meaning(mapping, space)
        state, action = (_places(part, space.names) for part in (mapping.state, mapping.action))
    _require_complete("state", state, folder.vectors)
    _require_complete("action", action, {action[0].feature: folder.actions})
    _require_range(folder, space, action)
    features = FeatureMap(
        action_spaces=spaces,
        cameras=cameras,
        sides={camera: folder.pictures[feature][0] for camera, feature in cameras.items()},
        state=state,
        action=action,
        rate_hz=space.rate_hz,
    )
    whole = _digest([folder.revision, features.to_json()])
    return replace(features, revision=folder.revision if plain else f"{folder.revision} mapped {whole}")


def _robots(folder: LeRobotFolder, robots: Sequence[str], mapping: DataMapping | None) -> tuple[str, ...]:
    if mapping is not None:
        lookup("robot of the mapping", mapping.robot, ROBOTS)
        if {*robots} - {mapping.robot}:
            raise BlmError(f"the mapping is of the robot '{mapping.robot}', not of {', '.join(robots)}")
        return (mapping.robot,)
    fitting = [name for name, spec in ROBOTS.items() if spec.action_space.dim == folder.actions]
    if not robots:
        choices = f"its {folder.actions} actions fit {', '.join(fitting) or 'none of ' + ', '.join(ROBOTS)}"
        raise BlmError(f"a LeRobot policy does not say which robot it is for; {choices}: name it (--robots)")
    for name in robots:
        if lookup("robot", name, ROBOTS).action_space.dim != folder.actions:
            raise BlmError(
                f"the policy has {folder.actions} actions, '{name}' needs "
                f"{', '.join(ROBOTS[name].action_space.names)}; they fit {', '.join(fitting) or 'no robot'}"
            )
    return tuple(robots)


def _cameras(folder: LeRobotFolder, stated: Mapping[str, str], plain: bool) -> dict[str, str]:
    """Return camera -> feature, for each picture that the policy sees."""
    own = {name.removeprefix(PICTURES): name for name in folder.pictures if name.startswith(PICTURES)}
    cameras = own if plain else {camera: name for camera, name in stated.items() if name in folder.pictures}
    missing = [name for name in folder.pictures if name not in cameras.values()]
    missing += [name for camera, name in cameras.items() if camera not in CAMERAS]
    if missing:
        raise BlmError(
            f"no camera of the suite for the policy's {', '.join(map(repr, missing))}; cameras: "
            f'{", ".join(CAMERAS)}. State them in a mapping (--mapping): "cameras": {{CAMERA: FEATURE}}'
        )
    for name, (height, width) in folder.pictures.items():
        if height != width or not 16 <= height <= 1024:
            raise BlmError(
                f"the policy sees '{name}' with {height} x {width} px; the suite draws squares of 16 to 1024"
            )
    return cameras


def _require_meaning(mapping: DataMapping, space: ActionSpace) -> None:
    """Raise BlmError unless the mapping states joint targets of the robot, as the suite's arms take."""
    for what, part in (("action", mapping.action), ("state", mapping.state)):
        stated = {one.name: (one.kind, UNITS[one.unit][0]) for one in part}
        needed = dict(zip(space.names, zip(space.dimension_kinds, space.units, strict=True), strict=True))
        for name in {**needed, **stated}:
            if stated.get(name) != needed.get(name):
                raise BlmError(
                    f"'{name}' of the mapping's {what} is {stated.get(name, 'missing')}; the suite's "
                    f"'{space.robot}' needs {needed.get(name, 'no such dimension')}: joint positions [rad] "
                    f"and the gripper, named {', '.join(space.names)}"
                )
    if mapping.rate_hz != space.rate_hz:
        raise BlmError(f"the mapping has {mapping.rate_hz:g} Hz, the suite controls at {space.rate_hz:g} Hz")


def _places(part: Sequence[Dimension], names: Sequence[str]) -> tuple[Place, ...]:
    found = {one.name: one for one in part}
    return tuple(
        Place(feature=d.feature, index=d.index, scale=d.scale, zero=d.zero)
        for d in (found[name] for name in names)
    )


def _require_complete(what: str, places: Sequence[Place], lengths: Mapping[str, int]) -> None:
    """Raise BlmError unless each number of the policy's vectors has one place, and there are no others."""
    needed = {(name, index) for name, length in lengths.items() for index in range(length)}
    given = {(place.feature, place.index) for place in places}
    if unlike := sorted(needed ^ given):
        name, index = unlike[0]
        side = "the policy has it, the robot does not" if unlike[0] in needed else "the policy lacks it"
        sizes = ", ".join(f"'{name}' ({length})" for name, length in lengths.items()) or "none"
        raise BlmError(
            f"number {index} of '{name}' in the {what}: {side}. The policy has {sizes}, the robot "
            f"{len(places)}; state where each is in a mapping (--mapping)"
        )


def _require_range(folder: LeRobotFolder, space: ActionSpace, action: Sequence[Place]) -> None:
    """Raise BlmError if training actions are far beyond the limits, so that the unit must differ."""
    if folder.action_range is None or min(map(len, folder.action_range)) < len(action):
        return
    for one, name, low, high in zip(action, space.names, space.low, space.high, strict=True):
        ends = sorted((float(bound[one.index]) - one.zero) * one.scale for bound in folder.action_range)
        span = high - low
        if ends[0] < low - span or ends[1] > high + span:
            raise BlmError(
                f"the policy's training actions of '{name}' are {ends[0]:.4g} to {ends[1]:.4g}, the robot's "
                f"limits {low:.4g} to {high:.4g}: another unit? State it in a mapping (--mapping)"
            )


def lerobot_process(
    model: str, *, robots: Sequence[str], mapping: Path | None, python: Path, device: str
) -> LeRobotProcess:
    """Return the process, not yet started, of the policy `model`, "lerobot:FOLDER".

    Raises BlmError for a policy that does not fit the suite.
    """
    folder = read_folder(Path(model.removeprefix(PREFIX)))
    features = map_features(folder, robots, None if mapping is None else read_mapping(mapping))
    return LeRobotProcess(folder.path, features, python=python, device=device)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
