"""Time until a program is ready: `blm --help`, `import blm`, and `blm serve` until its first action.

    python benchmarks/startup.py [--models blm-nano nano-onnx] [--repeats 3]

Wall time and the processor's time of the whole process are printed [s], as medians; the second is
also valid beside other work.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro

from blm.serving.client import RemotePolicy
from blm.types import Observation

ROOT = Path(__file__).parents[1]
CLI = "from blm.cli import main; main()"
Times = tuple[float, float]
"""Wall time and processor time [s]."""


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_once(words: list[str]) -> Times:
    """Return the times of a program that ends."""
    before, begin = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", *words], check=True, stdout=subprocess.DEVNULL, env=_environment())
    wall, after = time.perf_counter() - begin, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu


def serve_once(model: str) -> Times:
    """Return the times from the start of a server to the first action that a client receives."""
    begin = time.perf_counter()
    words = [sys.executable, "-W", "ignore", "-c", CLI, "serve", model, "--port", "0"]
    server = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=_environment()
    )
    try:
        assert server.stdout is not None
        address = re.search(r"ws://[\d.]+:\d+", server.stdout.readline())
        assert address is not None, "the server ended before it listened"
        with RemotePolicy(_when_open(address[0])) as policy:
            contract = policy.contract
            robot, space = next(iter(contract.action_spaces.items()))
            blank = np.zeros((contract.image_size, contract.image_size, 3), np.uint8)
            images = dict.fromkeys(contract.cameras, blank)
            policy.act(Observation(images=images, state=space.middle_state(), instruction="go", robot=robot))
        return time.perf_counter() - begin, _processor_seconds(server.pid)
    finally:
        server.terminate()
        server.wait()


def _when_open(address: str) -> str:
    """Return the address as soon as a connection succeeds there."""
    from blm.types import BlmError

    end = time.monotonic() + 120
    while True:
        try:
            RemotePolicy(address, timeout_s=60).close()
            return address
        except BlmError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(models: tuple[str, ...], repeats: int) -> dict[str, Any]:
    """Return the median times of all programs."""
    programs: dict[str, Callable[[], Times]] = {
        "blm --help": lambda: run_once([CLI, "--help"]),
        "import blm": lambda: run_once(["import blm"]),
    }
    for one in models:
        programs[f"blm serve {Path(one).name} to first action"] = partial(serve_once, one)
    found = dict[str, list[Times]]()
    for _ in range(repeats):
        for name, call in programs.items():
            found.setdefault(name, []).append(call())
    return {
        name: {"wall_s": round(median(w for w, _ in rows), 2), "cpu_s": round(median(c for _, c in rows), 2)}
        for name, rows in found.items()
    }


def main(models: tuple[str, ...] = ("blm-nano",), repeats: int = 3) -> None:
    """Print one JSON object."""
    print(json.dumps({"load": os.getloadavg()[0], **measure(models, repeats)}, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
