"""Checkpoint folders: written whole, read only if unaltered.

    checkpoint/  config.json  policy.safetensors  stats.json  README.md  manifest.json  (backbone/)

manifest.json holds the sha256 of every other file. That of the model card, README.md, is not required when a
checkpoint is read: people add to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from blm.backbone.backbone import RELEASED
from blm.datasets.transforms import RobotTransforms
from blm.io import MARK, new_folder, read_json, recover_folder, require_no_pointer, sha256_file
from blm.policy.card import model_card
from blm.types import BlmError, PolicyContract

FORMAT = 1
RELEASES: dict[str, Path] = {"blm-nano": RELEASED / "blm-nano"}
"""Name -> folder of the checkpoints that ship with the package."""


def folder_of(name_or_folder: str | Path) -> Path:
    """Return the folder of a checkpoint or release; a checkpoint here that is called as a release wins."""
    folder = recover_folder(Path(name_or_folder))
    return folder if (folder / "manifest.json").is_file() else RELEASES.get(str(name_or_folder), folder)


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    transforms: Mapping[str, RobotTransforms],
    more: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a checkpoint folder whole, in the place of an unaltered checkpoint that is there.

    `more` adds files to the folder that it is given. What others added to the former folder is kept, a card
    that they changed as README.md.kept. Raises BlmError for anything else at `folder`.
    """
    with new_folder(folder, written=_written) as work:
        more(work)
        (work / "policy.safetensors").write_bytes(save(dict(weights)))
        (work / "config.json").write_text(json.dumps({"format": FORMAT, **config}, indent=1))
        (work / "stats.json").write_text(json.dumps(_ranges(transforms), indent=1))
        (work / "README.md").write_text(model_card(config))
        hashes = _hashes(work) | {"README.md": sha256_file(work / "README.md")}
        (work / "manifest.json").write_text(json.dumps(hashes, indent=1))


def require_free(folder: Path) -> None:
    """Raise BlmError, before hours of training, if `write_checkpoint` would refuse this place."""
    if recover_folder(folder).exists():
        _written(folder)


def _written(folder: Path) -> set[str]:
    """Names of what this program wrote in a checkpoint. Raises BlmError for what it cannot vouch for."""
    config = read_config(folder)
    stored = json.loads((folder / "manifest.json").read_text())
    card, ours = folder / "README.md", {*stored, "manifest.json"} - {"README.md"}
    pristine = stored.get("README.md") if "README.md" in stored else None
    if card.is_file() and (sha256_file(card) == pristine or card.read_text() == model_card(config)):
        ours.add("README.md")
    return ours


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json. Raises BlmError, naming file and fix, unless the folder is whole and unaltered."""
    if not (recover_folder(folder) / "manifest.json").is_file():
        raise BlmError(f"no checkpoint at '{folder}' (no manifest.json); give the folder that Stage II wrote")
    stored, found = read_json(folder / "manifest.json"), _hashes(folder)
    if not isinstance(stored, dict) or "config.json" not in stored:
        raise BlmError(f"'{folder}' is no checkpoint: its manifest.json is of another program")
    for name in {*stored} - {"README.md"}:  # which older manifests name
        if found.get(name) != stored[name]:
            require_no_pointer(folder / name)
            what = "altered" if name in found else "missing"
            raise BlmError(f"checkpoint '{folder}': {name} is {what}; copy the folder again or train again")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if config["format"] != FORMAT:
        raise BlmError(
            f"checkpoint '{folder}' has format {config['format']}, this program reads {FORMAT}; "
            "use the program version that wrote it"
        )
    return config


def read_contract(folder: Path) -> PolicyContract:
    """The contract that a policy in this folder was trained for; raises as `read_config`."""
    return PolicyContract.from_json(read_config(folder)["contract"])


def read_transforms(folder: Path) -> dict[str, RobotTransforms]:
    stats = json.loads((folder / "stats.json").read_text())
    return {robot: RobotTransforms.from_json(value) for robot, value in stats.items()}


def identified(
    contract: PolicyContract, network: nn.Module, transforms: Mapping[str, RobotTransforms], frozen: str = ""
) -> PolicyContract:
    """Return the contract with hashes of the weights, `frozen` ones by fingerprint, and of all ranges."""
    ranges = json.dumps(_ranges(transforms), sort_keys=True)  # robots come in any order
    weights = save(network.state_dict()) + frozen.encode()
    revision, statistics = (hashlib.sha256(of).hexdigest()[:16] for of in (weights, ranges.encode()))
    return replace(contract, revision=revision, statistics=statistics)


def _ranges(transforms: Mapping[str, RobotTransforms]) -> dict[str, Any]:
    return {robot: values.to_json() for robot, values in transforms.items()}


def kind_of(folder: Path) -> str:
    """What a checkpoint calls itself, unchecked: "blm", or a baseline; those from before kinds are BLM's."""
    try:
        return str(json.loads((folder_of(folder) / "config.json").read_text()).get("kind", "blm"))
    except (OSError, ValueError, AttributeError):  # reading the checkpoint will say what is wrong with it
        return "blm"


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file in `folder` except the manifest, the card and marks, by relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in files)
    besides = {"manifest.json", "README.md", MARK}
    return {name: sha256_file(folder / name) for name in names if name not in besides}
