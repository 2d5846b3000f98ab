"""The parity gate of an exported policy: in closed loop, paired with its checkpoint over scenes.

    python benchmarks/parity.py --checkpoint blm-nano --exported nano-onnx --out parity [--episodes 50]

Both drive the same scenes of suite24 with the same seeds: `episodes` for each robot and task, so
24 times as many in all (50 are the 1,200 of the suite). The gate: the lower bound of the paired
difference in success (exported minus torch, 95 %) is at or above -3 points. A precision that fails
it is not offered. Run the same command again to resume; several exports of one checkpoint share the
result of torch in the same `--out`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import tyro

from blm.app.exported import load_exported
from blm.app.policies import load_checkpoint
from blm.evaluation import PhysicalProtocol, PhysicalResult, compare, evaluate_physical
from blm.evaluation.named_protocols import ProtocolOverrides
from blm.evaluation.physical.ready_policy import ReadyPolicy
from blm.types import Policy

MARGIN = -0.03
"""Smallest acceptable lower bound of the difference in success."""


def main(
    exported: Path,
    out: Path,
    checkpoint: str = "blm-nano",
    episodes: int = 50,
    workers: int = 2,
    robots: tuple[str, ...] = (),
) -> None:
    """Print the paired difference, and exit with 1 if the gate is not passed."""
    factories: dict[str, Callable[[], Policy]] = {
        "torch": partial(load_checkpoint, Path(checkpoint)),
        "exported": partial(load_exported, exported),
    }
    results = dict[str, PhysicalResult]()
    for name, make in factories.items():
        ready = ReadyPolicy(make)
        changes: ProtocolOverrides = {"episodes": episodes}
        if robots:
            changes["robots"] = robots
        protocol = PhysicalProtocol.named("suite24", ready.contract, **changes)
        folder = out / (exported.name if name == "exported" else name)
        results[name] = evaluate_physical(ready, protocol, folder, workers=workers, videos_per_cell=0)
    found = compare(results["exported"], results["torch"])
    passed = found.low >= MARGIN
    print(
        json.dumps(
            {
                "n": found.n,
                "exported": found.first,
                "torch": found.second,
                "difference": found.difference,
                "interval_95": [found.low, found.high],
                "only_exported": found.only_first,
                "only_torch": found.only_second,
                "passed": passed,
            },
            indent=1,
        )
    )
    raise SystemExit(not passed)


if __name__ == "__main__":
    tyro.cli(main)
