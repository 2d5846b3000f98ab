"""Time of one decision on new frames: several programs in turn, in one run, with single threads.

    python benchmarks/decisions.py --checkpoint blm-nano --exported nano-onnx [--before WORKTREE]

Every variant is a process of its own, so that no library slows another down: torch with this
program, torch with an older checkout of it (`--before`, the commit to compare with), and each
exported folder, without torch. They are asked in turn, `repeats` times, for the same observations.
Wall time says what a robot waits on this machine; the processor's time is also valid beside other
work. Ratios are medians of those of neighbouring repeats, with a 95 % bootstrap interval.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

ROOT = Path(__file__).parents[1]
CHILD = """
import json, os, sys, time
import numpy as np
kind, source, threads, batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
begin = time.perf_counter()
if kind == "exported":
    from blm.edge.policy import ExportedPolicy
    policy = ExportedPolicy.load(source, threads=threads)
else:
    import torch
    torch.set_num_threads(threads)
    from blm.policy.policy import CheckpointPolicy
    more = {"compile": "default"} if kind == "compiled" else {}
    policy = CheckpointPolicy.load(source, actions_only=True, **more)
from blm.types import Observation
contract = policy.contract
robot, space = next(iter(contract.action_spaces.items()))
def observe(rng, seed):
    side = contract.image_size
    coarse = rng.integers(0, 256, (len(contract.cameras), 8, 8, 3)).astype(np.uint8)
    big = coarse.repeat(-(-side // 8), 1).repeat(-(-side // 8), 2)[:, :side, :side]
    return Observation(robot=robot, instruction="Pick up the red cube and move it to the green goal.",
                       images=dict(zip(contract.cameras, big)), state=space.middle_state(), seed=seed)
print(json.dumps({"start_s": time.perf_counter() - begin}), flush=True)
for line in sys.stdin:
    rng = np.random.default_rng(int(line))
    given = [observe(rng, row) for row in range(batch)]
    wall, cpu = time.perf_counter(), time.process_time()
    chunks = policy.act_batch(given)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    found = {"wall_ms": 1e3 * wall, "cpu_ms": 1e3 * cpu, "actions": chunks[0].actions.tolist()}
    print(json.dumps(found), flush=True)
"""


@dataclass(frozen=True)
class Variant:
    """One program under test."""

    name: str
    kind: str
    source: str
    code: Path = ROOT


class Child:
    """A variant in a process of its own."""

    def __init__(self, variant: Variant, threads: int, batch: int) -> None:
        environment = os.environ | {"PYTHONPATH": str(variant.code), "OMP_NUM_THREADS": str(threads)}
        words = [sys.executable, "-W", "ignore", "-c", CHILD, variant.kind, variant.source]
        self.process = subprocess.Popen(
            [*words, str(threads), str(batch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd="/",
        )
        self.start_s = float(self._read()["start_s"])

    def decide(self, seed: int) -> dict[str, Any]:
        """Return the times of one batch of decisions, and the actions of its first chunk."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a variant ended early; run it alone to see why")
        value: dict[str, Any] = json.loads(line)
        return value


def measure(
    variants: Sequence[Variant], *, repeats: int, threads: int, batch: int, warm_up: int = 3
) -> dict[str, Any]:
    """Return medians of all variants [ms], and ratios of the first one to each other."""
    children = {variant.name: Child(variant, threads, batch) for variant in variants}
    rows = list[dict[str, dict[str, Any]]]()
    for repeat in range(repeats + warm_up):
        rows.append({name: child.decide(repeat) for name, child in children.items()})
    for child in children.values():
        child.close()
    rows = rows[warm_up:]
    first = variants[0].name
    found = dict[str, Any]()
    for name, child in children.items():
        gaps = [np.subtract(row[name]["actions"], row[first]["actions"]) for row in rows]
        found[name] = {
            "wall_ms": {
                what: float(f([row[name]["wall_ms"] for row in rows]))
                for what, f in (("median", np.median), ("best", np.min))
            },
            "cpu_ms": float(np.median([row[name]["cpu_ms"] for row in rows])),
            "load_s": round(child.start_s, 2),
            "largest_difference": float(max(np.abs(gap).max() for gap in gaps)),
        }
        if name != first:
            found[name] |= {
                f"{first} over this, {time_}": ratio(rows, first, name, f"{time_}_ms")
                for time_ in ("wall", "cpu")
            }
    return found


def ratio(rows: Sequence[dict[str, dict[str, Any]]], over: str, under: str, what: str) -> list[float]:
    """Return the median ratio of neighbouring repeats, and its 95 % bootstrap interval."""
    values = np.array([row[over][what] / row[under][what] for row in rows])
    draws = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    low, high = np.quantile(np.median(values[draws], axis=1), [0.025, 0.975])
    return [round(float(x), 2) for x in (np.median(values), low, high)]


def matrix_speed(side: int = 1024, repeats: int = 10) -> float:
    """Return the float32 arithmetic that a matrix product of NumPy reaches here [GFLOP/s]."""
    x, best = np.ones((side, side), np.float32), float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best / 1e9


def main(
    checkpoint: str = "blm-nano",
    exported: tuple[Path, ...] = (),
    before: Path | None = None,
    compile: bool = False,
    repeats: int = 40,
    threads: int = 1,
    batches: tuple[int, ...] = (1, 8),
) -> None:
    """Print one JSON object."""
    variants = [Variant("torch", "torch", checkpoint)]
    if before is not None:
        variants.insert(0, Variant("before", "torch", checkpoint, before.resolve()))
    if compile:
        variants.append(Variant("torch compiled", "compiled", checkpoint))
    variants += [Variant(folder.name, "exported", str(folder.resolve())) for folder in exported]
    found = {
        f"batch {batch}": measure(variants, repeats=repeats, threads=threads, batch=batch)
        for batch in batches
    }
    about = {"cores": os.cpu_count(), "threads": threads, "repeats": repeats, "load": os.getloadavg()[0]}
    print(json.dumps({**about, "matrix_gflops": round(matrix_speed(), 1), **found}, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
