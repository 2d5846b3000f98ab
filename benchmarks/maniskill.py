"""Speed of ManiSkill's environment and of ours, on one machine in one run.

Run it on an idle machine:

    .venv/bin/python benchmarks/maniskill.py [--repeats 10] [--other .venv-maniskill]

Each simulator runs in a separate process and environment; the two take turns, so that background
load affects both. It prints control steps (with images: observations) per second for the Panda in
PickCube, as means, and the ratio ours / ManiSkill as a geometric mean over the pairs, also per
second of processor time, which depends less on other load. Each number has a 95 % interval
(Student's t).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

_T_95 = {5: 2.78, 10: 2.26, 20: 2.09}
"""Two-sided 95 % quantile of Student's t by number of repeats."""
SETUPS: dict[str, tuple[tuple[str, ...], int]] = {
    "224 px, 2 cam": (("base", "wrist"), 60),
    "112 px, 3 cam": (("base", "side", "wrist"), 60),
    "no images": ((), 300),
}
"""Cameras, and the number of control steps per measurement."""


def serve(simulator: str, setup: str) -> None:
    """Worker: for each line on standard input, run the steps and print steps per second."""
    cameras, steps = SETUPS[setup]
    if simulator == "maniskill":
        from blm.tasks.maniskill import ManiSkillEnv as Env
    else:
        from blm.tasks import Env  # type: ignore[assignment]
    size = int(setup.split()[0]) if cameras else 112
    env = Env("panda", "pick_cube", cameras=cameras, image_size=size, max_steps=10**9)
    env.reset(seed=0)
    hold = np.array([*env.robot.home, 1.0], dtype=np.float32)
    env.step(hold)  # the first image compiles shaders
    for turn, _ in enumerate(sys.stdin):
        start, busy = time.perf_counter(), time.process_time()
        for step in range(steps):
            hold[0] = 0.3 * np.sin((turn * steps + step) / 20)  # keep the scene moving
            env.step(hold)
        wall, busy = time.perf_counter() - start, time.process_time() - busy
        print(f"rate {steps / wall} {steps / busy}", flush=True)
    env.close()


def interleaved(pythons: dict[str, str], setup: str, repeats: int) -> dict[str, np.ndarray]:
    """Return steps per second of each simulator [repeats, 2 (wall, processor)].

    The first turn is not counted.
    """
    command = [__file__, "--setup", setup, "--serve"]
    workers = {
        name: subprocess.Popen(
            [python, "-W", "ignore", *command, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, python in pythons.items()
    }
    rates: dict[str, list[list[float]]] = {name: [] for name in workers}
    for _ in range(repeats + 1):
        for name, worker in workers.items():
            assert worker.stdin and worker.stdout
            print("go", file=worker.stdin, flush=True)
            line = next((line for line in worker.stdout if line.startswith("rate ")), "")
            if not line:
                raise SystemExit(f"the {name} worker stopped; see its message above")
            rates[name].append([float(value) for value in line.split()[1:]])
    for worker in workers.values():
        worker.communicate()
    return {name: np.array(values[1:]) for name, values in rates.items()}


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % interval."""
    return float(values.mean()), float(_T_95[len(values)] * values.std(ddof=1) / np.sqrt(len(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10, choices=sorted(_T_95))
    parser.add_argument("--other", default=".venv-maniskill", help="folder of ManiSkill's environment")
    parser.add_argument("--setup", choices=list(SETUPS), help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=("maniskill", "mujoco"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.setup)
        return
    pythons = {"mujoco": sys.executable, "maniskill": str(Path(args.other, "bin", "python"))}
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before; n = {args.repeats} pairs of turns\n"
    )
    print("| Panda | ours (MuJoCo) | ManiSkill | ratio | ratio, processor time |\n|---|---|---|---|---|")
    for setup in SETUPS:
        rates = interleaved(pythons, setup, args.repeats)
        cells = ["{:.1f} ± {:.1f}".format(*interval(rates[name][:, 0])) for name in ("mujoco", "maniskill")]
        for clock in (0, 1):
            middle, half = interval(np.log(rates["mujoco"] / rates["maniskill"])[:, clock])
            low, high = np.exp(middle - half), np.exp(middle + half)
            cells.append(f"{np.exp(middle):.1f} ({low:.1f} to {high:.1f})")
        print("| " + " | ".join([setup, *cells]) + " |", flush=True)
    print(f"\nload afterwards {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
