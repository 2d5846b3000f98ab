"""The record of what a run or cache is made from, which a second run in its folder must equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blm.io import read_json, write_json
from blm.types import BlmError

OUTPUTS = (
    "log.jsonl",
    "manifest.json",
    "journal*.jsonl",
    "state-*.safetensors",
    "best.safetensors",
    "*.npy",
)
"""Files from which a run resumes, or which it replaces or removes."""


def require_same_inputs(path: Path, inputs: Mapping[str, Any], complaint: str) -> None:
    """Write the inputs of a new run to `path`, with their sha256; compare with those of an existing
    run.

    Raises BlmError, beginning with `complaint` and naming what differs, if a run in this folder was
    made from other inputs; and if the folder has OUTPUTS but no record.
    """
    text = json.dumps(inputs, sort_keys=True)
    wanted = {**json.loads(text), "key": hashlib.sha256(text.encode()).hexdigest()}
    outputs = sorted({found.name for name in OUTPUTS for found in path.parent.glob(name)})
    if path.exists():
        stored = read_json(path)
        stored = stored if isinstance(stored, dict) else {}
        if stored == wanted:
            return
        if outputs:
            other = ", ".join(name for name in inputs if stored.get(name) != wanted[name])
            raise BlmError(
                f"{complaint}: made from another {other}; name another folder, or move this one away"
            )
    elif outputs:
        raise BlmError(
            f"'{path.parent}' has {', '.join(outputs[:3])} but no {path.name}: this program did not begin "
            "it; name another folder"
        )
    write_json(path, wanted)
