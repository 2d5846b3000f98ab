"""The record of what a run or cache is made from, which a second run in its folder must equal, and
so must all processes that train together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from blm.io import read_json, write_json
from blm.training.loop.distributed import Processes
from blm.types import BlmError

T = TypeVar("T")
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
    """Write the inputs of a new run to `path`; compare with those of an existing run.

    Their sha256 is written, too. Raises BlmError, beginning with `complaint` and naming the
    difference, if a run in this folder has other inputs; and if the folder has OUTPUTS but no
    record.
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
            names = (name for name in {**inputs, **stored} if name != "key")
            other = ", ".join(name for name in names if stored.get(name) != wanted.get(name))
            raise BlmError(f"{complaint}: it has another {other}; name another folder, or move this one away")
    elif outputs:
        raise BlmError(
            f"'{path.parent}' has {', '.join(outputs[:3])} but no {path.name}: this program did not begin "
            "it; name another folder"
        )
    write_json(path, wanted)


def run_together(processes: Processes, action: Callable[[], T]) -> T:
    """Return `action()` of this process when all processes have run it. Raises BlmError in every
    process if it failed in one, naming that process."""
    fault, found = "", None
    try:
        found = action()
    except BlmError as error:
        if processes.count == 1:
            raise
        fault = str(error)
    for rank, text in enumerate(processes.gather_objects(fault)):
        if text:
            raise BlmError(f"process {rank} of {processes.count}: {text}")
    return cast(T, found)


def require_same_facts(processes: Processes, what: str, facts: Mapping[str, Any]) -> None:
    """Raise BlmError in every process, naming process and fact, unless all of them have the same
    facts: they must see the same files."""
    first, *others = processes.gather_objects(facts)
    for rank, other in enumerate(others, start=1):
        if names := list(_differences(first, other)):
            raise BlmError(
                f"{what}: process {rank} of {processes.count} has another {', '.join(names)} than process 0; "
                "all processes must see the same files, in a shared folder or in equal copies"
            )


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """Yield the dotted names of the values that differ."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in there:
            yield from _differences(there[key], here.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for number, pair in enumerate(zip(there, here, strict=True)):
            yield from _differences(*pair, f"{name}.{number}")
    elif there != here:
        yield name
