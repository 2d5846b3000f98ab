"""Speed of the simulator on one core: images per second and physics steps per second, per robot.

Run it on an idle machine:

    LP_NUM_THREADS=1 python benchmarks/sim.py [--repeats 10] [--robots panda xarm6]

It prints a table in Markdown: means over the repeats with a 95 % interval of the mean (Student's
t). An image includes rendering and the transfer to NumPy; the scene moves between images. Physics
steps last 2 ms and include the grasp and success checks of `Env`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import numpy as np

from blm.evaluation.results import this_machine
from blm.robots import ROBOTS
from blm.tasks import Env, gl_backend
from blm.tasks.scene import SUBSTEPS

_T_95 = {3: 4.30, 5: 2.78, 10: 2.26, 20: 2.09}
"""Two-sided 95 % quantile of Student's t by number of repeats."""


def machine() -> str:
    """Return one line: processor, cores, load, versions."""
    about = this_machine()
    packages = ", ".join(f"{name} {about.packages[name]}" for name in ("mujoco", "numpy"))
    versions = f"python {about.python}, {packages}"
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{about.processor}, {about.cores} cores, load {load}; {versions}, {gl_backend()}"


def rate(work: Callable[[], int], repeats: int) -> str:
    """Time `work`, which returns its amount, after one warm-up run; return 'mean ± half width'."""
    work()
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        amount = work()
        rates.append(amount / (time.perf_counter() - start))
    half = _T_95[repeats] * np.std(rates, ddof=1) / np.sqrt(repeats)
    return f"{np.mean(rates):.0f} ± {half:.0f}"


def pictures(robot: str, size: int, cameras: tuple[str, ...], repeats: int) -> str:
    env = Env(robot, "pick_cube", cameras=cameras, image_size=size)
    env.reset(seed=0)

    def work() -> int:
        for _ in range(30):
            env.data.qpos[0] += 0.001
            env._refresh()
            env.observe()
        return 30 * len(cameras)

    result = rate(work, repeats)
    env.close()
    return result


def physics(robot: str, repeats: int) -> str:
    env = Env(robot, "pick_cube", cameras=(), max_steps=10**9)
    env.reset(seed=0)
    hold = np.array([*env.robot.home, 1.0], dtype=np.float32)

    def work() -> int:
        for _ in range(40):
            env.step(hold)
        return 40 * SUBSTEPS

    return rate(work, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10, choices=sorted(_T_95))
    parser.add_argument("--robots", nargs="+", default=list(ROBOTS), choices=list(ROBOTS))
    args = parser.parse_args()
    print(machine())
    print(f"images/s and physics steps/s, one process, n = {args.repeats} repeats, mean ± 95 % interval\n")
    setups = [(size, cameras) for size in (128, 224) for cameras in (("base",), ("base", "wrist"))]
    views = {f"{size} px, {len(cameras)} cam": (size, cameras) for size, cameras in setups}
    print("| robot | " + " | ".join(views) + " | physics |\n|" + "---|" * (len(views) + 2))
    for robot in args.robots:
        cells = [pictures(robot, *view, args.repeats) for view in views.values()]
        print("| " + " | ".join([robot, *cells, physics(robot, args.repeats)]) + " |", flush=True)
    print(f"\nload afterwards {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
