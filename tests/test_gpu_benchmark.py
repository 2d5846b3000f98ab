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

SHAPE = "qwen2_5_vl_3b"
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


def run(out: Path, *options: str) -> dict[str, Any]:
    """Run the script with one tiny shape, two cameras and one repeat; return its parts."""
    flags = ["--tiny", "--device", "cpu", "--shapes", SHAPE, "--cameras", "2", "--repeats", "1"]
    command = [sys.executable, "benchmarks/gpu.py", *flags, "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(out.read_text())
    assert json.loads(done.stdout) == found and found["complete"]
    assert {"device", "torch", "machine", "options"} <= found.keys() and found["options"]["seed"] == 0
    assert all(math.isfinite(number) for number in numbers(found))
    parts: dict[str, Any] = found["backbones"][SHAPE]
    assert not list(errors(parts))
    return parts


def check_use(parts: dict[str, Any]) -> None:
    action = parts["action"]["2 cameras, batch 1"]
    assert {"vision tower", "tap", "bridge", "action", "predicted_peak_gib"} <= action["eager"].keys()
    assert action["eager"]["action"].keys() == {"p50_ms", "p99_ms", "n"}
    assert action["default"].keys() == {"action", "tap", "compile_s"}
    assert action["cuda-graphs"] == {"skipped": "CUDA graphs need a GPU"}
    fill = parts["cache fill"]["2 cameras"]
    assert fill.keys() == {"frames_per_s", "bytes_per_frame", "n", "predicted_peak_gib"}


def check_training(parts: dict[str, Any]) -> None:
    forms = {f"2 cameras, {form}" for form in ("cached", "compact", "live")}
    assert parts["stage2"].keys() == forms | {"seconds"}
    for form in forms:
        found = parts["stage2"][form]
        assert found.keys() == {"samples_per_s", "n", "predicted_peak_gib", "data_share", "batch"}
    for name in ("LoRA 16", "all but the vision tower"):
        for order in ("packed", "padded"):
            found = parts["stage1"][name][order].keys()
            assert found == {"tokens_per_s", "n", "predicted_peak_gib", "padding"}


def test_the_gpu_benchmark_measures_the_use_of_tiny_models(tmp_path: Path) -> None:
    parts = run(tmp_path / "gpu.json", "--parts", "action", "cache fill", "--batches", "1")
    assert parts.keys() == {"load", "action", "cache fill"}
    check_use(parts)


def test_the_gpu_benchmark_measures_stage_one_of_tiny_models(tmp_path: Path) -> None:
    parts = run(tmp_path / "gpu.json", "--parts", "stage1")
    assert {"packed", "padded"} <= parts["stage1"]["LoRA 16"].keys()


@pytest.mark.slow
def test_the_gpu_benchmark_runs_whole_on_a_cpu_with_tiny_models(tmp_path: Path) -> None:
    parts = run(tmp_path / "gpu.json")
    assert parts.keys() == {"load", "action", "cache fill", "stage2", "stage1"}
    check_use(parts)
    check_training(parts)
