"""A backbone's folder: stock transformers files, and a list of the files that we wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blm.io import MARK, files_below, new_folder, recover_folder
from blm.types import BlmError

NOTE = "blm.json"
"""Names and sizes of the files that this program wrote. Without it a folder is never replaced."""


def save_model(model: PreTrainedModel, folder: Path, stored: Mapping[str, torch.dtype]) -> None:
    """Write a model's weights and config; no bit of a weight is lost.

    `stored` is the precision of the tensors, by name, in the folder from which the model was
    loaded. A tensor that this precision holds exactly is written in it, so bfloat16 weights that
    were converted to float32 do not grow. The config names the widest precision, in which
    transformers loads the folder.
    """
    state = model.state_dict()
    written = dict[tuple[int, torch.dtype, torch.Size], Tensor]()
    converted = dict[str, Tensor]()
    for name, value in state.items():
        dtype = stored.get(name, value.dtype)
        key = (value.data_ptr(), dtype, value.shape)  # tied weights stay tied
        if key not in written:
            smaller = value.to(dtype)
            written[key] = smaller if torch.equal(smaller.to(value.dtype), value) else value
        converted[name] = written[key]
    if all(converted[name].dtype == value.dtype for name, value in state.items()):
        model.save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict=converted)
    kinds = {value.dtype for value in converted.values() if value.is_floating_point()}
    if kinds:
        widest = str(max(kinds, key=lambda kind: kind.itemsize)).removeprefix("torch.")
        path = folder / "config.json"
        config = json.loads(path.read_text())
        if config.get("dtype") != widest:
            path.write_text(json.dumps({**config, "dtype": widest}, indent=2, sort_keys=True) + "\n")


def save_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder, which replaces a folder that this program wrote.

    Raises BlmError for a folder of other origin.
    """
    with new_folder(folder, written=written) as work:
        write(work)
        sizes = {name: (work / name).stat().st_size for name in files_below(work) if name != MARK}
        (work / NOTE).write_text(json.dumps({"format": 1, "files": sizes}, indent=1))


def require_free(folder: Path) -> None:
    """Raise BlmError, before hours of training, if `save_folder` would refuse this path."""
    if recover_folder(folder).exists():
        written(folder)


def written(folder: Path) -> set[str]:
    """Return the names of the files that `save_folder` wrote.

    Raises BlmError for a folder of other origin.
    """
    try:
        sizes = dict(json.loads((folder / NOTE).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise BlmError(
            f"'{folder}' exists, and nothing in it shows that this program wrote it: move it away, or name "
            "another folder"
        ) from None
    there = {name for name in sizes if (folder / name).is_file()}
    changed = sorted(name for name in there if (folder / name).stat().st_size != sizes[name])
    if changed:
        raise BlmError(f"'{folder / changed[0]}' was altered, so '{folder}' is not replaced: move it away")
    return {*sizes, NOTE}
