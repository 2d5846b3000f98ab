"""Folders of exported policies: one manifest that describes the graphs and names every file.

    OUT/  export.json  eye.onnx  reader.onnx  actor.onnx  tokenizer.json  stats.json  README.md

export.json holds the sha256 of every other file but README.md, and that of itself. OpenVINO's
graphs are two files each, NAME.xml and NAME.bin.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from blm.datasets.transforms import RobotTransforms, statistics_hash
from blm.io import MARK, read_json, recover_folder, require_no_pointer, sha256_file
from blm.types import BlmError, PolicyContract, lookup

MANIFEST, CARD = "export.json", "README.md"
KIND, FORMAT = "blm-export", 1
Runtime = Literal["onnx", "openvino"]
Precision = Literal["float32", "bfloat16"]
GRAPHS = ("eye", "reader", "actor")
"""eye: pictures -> features. reader: tokens, features -> H_k. actor: H_k, state, noise -> actions."""
SUFFIX: Mapping[Runtime, str] = {"onnx": ".onnx", "openvino": ".xml"}


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """How an instruction becomes tokens."""

    parts: tuple[str, str, str]
    """Text before the robot's name, between it and the instruction, and after the instruction; one
    `picture` stands for each picture."""
    picture: str
    """The token of the text that stands for a picture."""
    picture_tokens: tuple[int, ...]
    """What replaces that token: the features of the picture, and what the model puts around them."""
    feature_token: int
    """The token that one feature of a picture replaces."""
    pad_token: int
    special_tokens: bool
    """Whether the tokenizer adds its own begin and end tokens."""
    reserved: tuple[str, ...]
    """Tokens that no instruction may contain."""
    context: int
    """Maximum number of tokens."""


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """The squares that the eye reads."""

    side: int
    """Side [px]."""
    resample: int
    """Pillow's filter for pictures of another size."""


@dataclass(frozen=True, kw_only=True)
class ExportManifest:
    """The content of export.json, beside kind, format and hashes."""

    runtime: Runtime
    precision: Precision
    contract: PolicyContract
    prompt: PromptTemplate
    pictures: PictureSettings
    max_dim: int
    """Width to which states and actions are padded."""
    batch: int | None
    """Number of observations in each run of the graphs; None: any."""
    length: int | None
    """Number of tokens of a prompt, which is padded to it; None: any."""
    operator_sets: Mapping[str, int]
    """Domain -> version of the ONNX operators in the graphs ("": those of ONNX)."""
    provenance: Mapping[str, Any]
    """What was exported, and with which versions."""

    def __post_init__(self) -> None:
        lookup("runtime", self.runtime, dict.fromkeys(get_args(Runtime)))
        lookup("precision", self.precision, dict.fromkeys(get_args(Precision)))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "contract": self.contract.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        prompt = dict(value["prompt"])
        listed = {name: tuple(prompt[name]) for name in ("parts", "picture_tokens", "reserved")}
        return cls(
            **{one.name: value[one.name] for one in fields(cls)}
            | {
                "contract": PolicyContract.from_json(value["contract"]),
                "prompt": PromptTemplate(**{**prompt, **listed}),
                "pictures": PictureSettings(**value["pictures"]),
            }
        )


def is_export(folder: str | Path) -> bool:
    """Return whether this is the folder of an exported policy, unchecked."""
    return (recover_folder(Path(folder)) / MANIFEST).is_file()


def write_manifest(folder: Path, manifest: ExportManifest) -> None:
    """Write export.json; all other files must be in the folder already."""
    value = {"kind": KIND, "format": FORMAT, **manifest.to_json(), "files": _hashes(folder)}
    text = json.dumps({**value, "sha256": _own_hash(value)}, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> ExportManifest:
    """Return the manifest.

    Raises BlmError, naming the file and a remedy, unless the folder is complete and unaltered, has
    the format of this program, and its statistics are those of its contract.
    """
    if not is_export(folder):
        raise BlmError(
            f"no exported policy at '{folder}' (no {MANIFEST}); write one: blm export onnx CHECKPOINT OUT"
        )
    stored = read_json(folder / MANIFEST)
    if not isinstance(stored, dict) or stored.get("kind") != KIND:
        raise BlmError(f"'{folder}' is not an exported policy: its {MANIFEST} belongs to another program")
    if stored.get("format") != FORMAT:
        raise BlmError(
            f"the exported policy '{folder}' has format {stored.get('format')}, this program reads {FORMAT}; "
            "export the checkpoint again, or use the program version that wrote it"
        )
    _require_unaltered(folder, stored)
    manifest = ExportManifest.from_json(stored)
    transforms = read_statistics(folder)
    contract = manifest.contract
    if statistics_hash(transforms) != contract.statistics or {*transforms} != {*contract.action_spaces}:
        raise BlmError(f"exported policy '{folder}': stats.json belongs to another contract; export it again")
    return manifest


def read_statistics(folder: Path) -> dict[str, RobotTransforms]:
    """Return the normalisation of each robot, from stats.json."""
    stats = json.loads((folder / "stats.json").read_text())
    return {robot: RobotTransforms.from_json(value) for robot, value in stats.items()}


def _require_unaltered(folder: Path, stored: Mapping[str, Any]) -> None:
    found = _hashes(folder)
    files: Mapping[str, str] = stored.get("files", {})
    for name, then in files.items():
        if found.get(name) != then:
            require_no_pointer(folder / name)
            raise _altered(folder, name, "altered" if name in found else "missing")
    if stored.get("sha256") != _own_hash(stored):
        raise _altered(folder, MANIFEST, "altered")


def _altered(folder: Path, name: str, what: str) -> BlmError:
    return BlmError(f"exported policy '{folder}': {name} is {what}; copy the folder or export again")


def _own_hash(value: Mapping[str, Any]) -> str:
    rest = {name: part for name, part in value.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file in `folder` except manifest, card and mark."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: sha256_file(path) for path in files if path.name not in (MANIFEST, CARD, MARK)}
