"""The form of a result file, and what two of them say about each other.

Both spaces write {"kind", "score", "model", "protocol", "protocol_hash", "rows", ...}. `score` names the
field of a row that is judged (success_once, correct); rows of two results pair by their "id".
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blm.evaluation.intervals import Difference, paired_difference
from blm.types import ContractError


def write_result(path: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Write a result file atomically; return what reading it gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps({"format": 1, **result}, indent=1, allow_nan=False)
    temporary.write_text(text)
    temporary.replace(path)
    return json.loads(text)


def machine() -> dict[str, Any]:
    """What the numbers were made on: processor, cores, system and package versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("blm", "numpy", "torch", "transformers", "mujoco")},
    }


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> Difference:
    """Paired difference of two results, first minus second.

    Raises ContractError that prints both sides for unlike protocols, items or scenes.
    """
    ours, theirs = first["protocol"], second["protocol"]
    unlike = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    if unlike:
        rows = [f"  {key}: {ours.get(key)!r} here, {theirs.get(key)!r} there" for key in unlike]
        raise ContractError("results of unlike protocols cannot be compared:\n" + "\n".join(rows))
    score, others = first["score"], {row["id"]: row for row in second["rows"]}
    for row in first["rows"]:
        other = others.get(row["id"], {})
        if not other or row.get("scene") != other.get("scene"):
            raise ContractError(
                f"item '{row['id']}' started from another scene, or is missing; evaluate again"
            )
    groups = [row["group"] for row in first["rows"]] if "group" in first["rows"][0] else None
    return paired_difference(
        [row[score] for row in first["rows"]], [others[row["id"]][score] for row in first["rows"]], groups
    )
