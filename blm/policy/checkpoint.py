"""Checkpoint folders: written atomically, read only if complete and unaltered.

    checkpoint/  config.json  policy.safetensors  stats.json  README.md  manifest.json  (backbone/)

manifest.json holds the sha256 of every other file. The model card, README.md, may differ: people
add to it.
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
from blm.datasets.transforms import RobotTransforms, statistics_hash, transforms_to_json
from blm.io import MARK, new_folder, read_json, recover_folder, require_no_pointer, sha256_file
from blm.policy.card import model_card
from blm.types import BlmError, PolicyContract

FORMAT = 1
RELEASES: dict[str, Path] = {
    "blm-nano": RELEASED / "blm-nano",
    "blm-nano-1": RELEASED / "blm-nano",
    "blm-nano-2": RELEASED / "blm-nano-2",
}
"""Name -> folder of the checkpoints that ship with the package. A name with a number stays that model
when a name without one becomes its successor."""


def checkpoint_folder(name_or_folder: str | Path) -> Path:
    """Return the folder of a checkpoint or release. A folder takes precedence over a release."""
    folder = recover_folder(Path(name_or_folder))
    return folder if (folder / "manifest.json").is_file() else RELEASES.get(str(name_or_folder), folder)


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    transforms: Mapping[str, RobotTransforms],
    more: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a checkpoint folder atomically; it may replace an unaltered checkpoint.

    `more` writes further files into the new folder. Files that others added to the old folder are
    kept; a model card that they changed is kept as README.md.kept. Raises BlmError if `folder` is
    anything else.
    """
    with new_folder(folder, written=_written) as work:
        more(work)
        (work / "policy.safetensors").write_bytes(save(dict(weights)))
        (work / "config.json").write_text(json.dumps({"format": FORMAT, **config}, indent=1))
        (work / "stats.json").write_text(json.dumps(transforms_to_json(transforms), indent=1))
        (work / "README.md").write_text(model_card(config))
        hashes = _hashes(work) | {"README.md": sha256_file(work / "README.md")}
        (work / "manifest.json").write_text(json.dumps(hashes, indent=1))


def require_free(folder: Path) -> None:
    """Raise BlmError, before hours of training, if `write_checkpoint` would refuse this folder."""
    if recover_folder(folder).exists():
        _written(folder)


def _written(folder: Path) -> set[str]:
    """Return the names of the files that this program wrote.

    Raises BlmError unless they are unaltered.
    """
    config = read_config(folder)
    stored = json.loads((folder / "manifest.json").read_text())
    card, ours = folder / "README.md", {*stored, "manifest.json"} - {"README.md"}
    pristine = stored.get("README.md") if "README.md" in stored else None
    if card.is_file() and (sha256_file(card) == pristine or card.read_text() == model_card(config)):
        ours.add("README.md")
    return ours


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json.

    Raises BlmError, naming the file and a remedy, unless the folder is complete and unaltered.
    """
    if not (recover_folder(folder) / "manifest.json").is_file():
        raise BlmError(f"no checkpoint at '{folder}' (no manifest.json); give the folder that Stage II wrote")
    stored, found = read_json(folder / "manifest.json"), _hashes(folder)
    if not isinstance(stored, dict) or "config.json" not in stored:
        raise BlmError(f"'{folder}' is not a checkpoint: its manifest.json belongs to another program")
    for name in {*stored} - {"README.md"}:  # listed in older manifests
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
    """Return the contract of the policy in this folder; raises as `read_config` does."""
    return PolicyContract.from_json(read_config(folder)["contract"])


def read_transforms(folder: Path) -> dict[str, RobotTransforms]:
    """Return the normalisation of each robot, from stats.json."""
    stats = json.loads((folder / "stats.json").read_text())
    return {robot: RobotTransforms.from_json(value) for robot, value in stats.items()}


def with_hashes(
    contract: PolicyContract, network: nn.Module, transforms: Mapping[str, RobotTransforms], frozen: str = ""
) -> PolicyContract:
    """Return the contract with `revision` and `statistics`, hashes of weights and transforms.

    `frozen` is the fingerprint of the frozen weights, which are part of the revision.
    """
    weights = save(network.state_dict()) + frozen.encode()
    return replace(
        contract,
        revision=hashlib.sha256(weights).hexdigest()[:16],
        statistics=statistics_hash(transforms),
    )


def checkpoint_kind(folder: Path) -> str:
    """Return the "kind" in config.json, unchecked: "blm" (also if it is missing) or a baseline."""
    try:
        return str(json.loads((checkpoint_folder(folder) / "config.json").read_text()).get("kind", "blm"))
    except (OSError, ValueError, AttributeError):  # `read_config` will report the fault
        return "blm"


def _hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file in `folder` except manifest, model card and marks."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in files)
    besides = {"manifest.json", "README.md", MARK}
    return {name: sha256_file(folder / name) for name in names if name not in besides}
