"""`benchmarks/gpu.py` runs whole on the CPU with tiny models, and writes what it has after each part."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, int | float):
        yield value


def errors(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        if "error" in value:
            yield f"{path}: {value['error']}"
        for name, inner in value.items():
            yield from errors(inner, f"{path}/{name}")


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu_with_tiny_models(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    shapes = ["--shapes", "qwen2_5_vl_3b", "--cameras", "2"]
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--device", "cpu", "--out", str(out), *shapes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(out.read_text())
    assert json.loads(done.stdout) == found and found["complete"]
    assert {"device", "torch", "machine", "options"} <= found.keys() and found["options"]["seed"] == 0
    parts = found["backbones"]["qwen2_5_vl_3b"]
    assert parts.keys() == {"load", "action", "cache fill", "stage2", "stage1"}
    assert all(math.isfinite(number) for number in numbers(found))
    wrong = list(errors(parts))
    assert all("CUDA graphs need a GPU" in error for error in wrong), wrong
    action = parts["action"]["2 cameras, batch 1"]
    assert {"vision tower", "tap", "bridge", "action"} <= action["eager"].keys()
    assert action["eager"]["action"].keys() == {"p50_ms", "p99_ms", "n"}
    assert parts["stage1"]["LoRA 16"].keys() >= {"packed", "padded"}
    assert parts["stage2"].keys() >= {"2 cameras, cached", "2 cameras, live"}
