"""The form of a result file, and what two of them say about each other.

Both spaces write {"kind", "score", "model", "protocol", "protocol_hash", "rows", ...}. `score` names the
field of a row that is judged (success_once, correct); rows of two results pair by their "id".
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blm.evaluation.intervals import Difference, paired_difference
from blm.evaluation.protocol import DigitalProtocol, PhysicalProtocol, protocol_hash, require_equal
from blm.types import ContractError


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path; when all went well, it becomes `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    temporary.replace(path)


def write_result(
    out: Path, protocol: PhysicalProtocol | DigitalProtocol, start: float, **parts: Any
) -> dict[str, Any]:
    """Write `out`/result.json; return what reading it gives. `start` is when the run began (monotonic)."""
    head = {"format": 1, "protocol": asdict(protocol), "protocol_hash": protocol_hash(protocol)}
    head |= {"machine": machine(), "seconds": time.monotonic() - start}
    text = json.dumps(head | parts, indent=1, allow_nan=False)
    with atomically(out / "result.json") as temporary:
        temporary.write_text(text)
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
    problem = "results of unlike protocols cannot be compared"
    require_equal(first["protocol"], second["protocol"], problem, "there")
    score, ours, by_id = first["score"], first["rows"], {row["id"]: row for row in second["rows"]}
    theirs = [by_id.get(row["id"], {}) for row in ours]
    for row, other in zip(ours, theirs, strict=True):
        if not other or row.get("scene") != other.get("scene"):
            name = f"item '{row['id']}'"
            raise ContractError(f"{name} started from another scene, or is missing; evaluate again")
    groups = [row["group"] for row in ours] if "group" in ours[0] else None
    return paired_difference([row[score] for row in ours], [row[score] for row in theirs], groups)
