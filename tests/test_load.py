"""Robots and people at one server, through `benchmarks/load.py`: all replies are right and in time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def load(out: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks/load.py"), "blm-nano", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    print(json.dumps({k: v for k, v in result.items() if k != "machine"}, indent=1))
    assert result["wrong_actions"] == result["wrong_answers"] == result["failed"] == 0
    return result


@pytest.mark.slow
def test_replies_match_their_requests(tmp_path: Path) -> None:
    result = load(tmp_path / "load.json", "--robots", "4", "--rate-hz", "2", "--chats", "2", "--seconds", "8")
    assert result["actions"] >= 16 and result["answers"] >= 2


def test_a_robot_waits_little_for_the_worst_requests(tmp_path: Path) -> None:
    """A short run: it must also hold on a busy machine, so it only asks that the robot goes on meanwhile."""
    out = tmp_path / "worst.json"
    command = [sys.executable, str(ROOT / "benchmarks/load.py"), "blm-nano", "--out", str(out), "--worst"]
    command += ["--only", "the longest text", "most pictures", "robot with a name"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    print(json.dumps(result, indent=1))
    assert result["health"] == 200
    for kind in ("chat of the longest text", "chat of the most pictures"):
        row = result["worst"][kind]
        assert row["outcome"] == "200" and row["decisions"] >= 5, "the robot went on meanwhile"
        assert row["max_ms"] < 1000 * row["seconds"] / 2 and row["memory_mb"] < 500
    assert "refused" in result["worst"]["attack: a robot with a name of 8 MB"]["outcome"]


@pytest.mark.slow
def test_chat_does_not_hold_up_robots(tmp_path: Path) -> None:
    result = load(tmp_path / "load.json")
    assert result["actions"] > 1000 and result["answers"] > 16
    assert result["p99_ratio"] <= 2.5 and result["overhead_ms"]["p50"] < 5
