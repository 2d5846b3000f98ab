"""Is suite24-plus fair? Count the scenes in which a policy could see the object and its goal.

A thing counts as visible if some camera shows at least 12 of its pixels, of 112 x 112, whose mean
colour differs from that of the pixels around them by at least 15 (Euclidean, of 255 per channel).

Run: python benchmarks/visibility.py [scenes per axis and level]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from blm.robots import ROBOTS
from blm.tasks import SUITE24, Env
from blm.tasks.suite_plus import AXES, LEVELS, perturbation
from blm.tasks.variation import PLAIN
from blm.tasks.visibility import MIN_PIXELS

CONTRAST, RING = 15.0, 3
CAMERAS: dict[str, tuple[str, ...]] = {"all": ("base", "side", "wrist"), "pair": ("base", "wrist")}


def is_visible(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> bool:
    """Whether the masked pixels of an image are enough, and differ from those around them."""
    if mask.sum() < MIN_PIXELS:
        return False
    ring = binary_dilation(mask, iterations=RING) & ~mask
    contrast = np.linalg.norm(image[mask].mean(axis=0) - image[ring].mean(axis=0))
    return bool(contrast >= CONTRAST)


def seen_by(env: Env) -> dict[str, set[str]]:
    """Return camera -> names of the task's things that it shows."""
    pictures = env.observe(CAMERAS["all"])["pixels"]
    return {
        camera: {i.name for i in env.items if is_visible(picture, env.mask(i.name, camera))}
        for camera, picture in pictures.items()
    }


def share_visible(env_of: dict[tuple[str, str], Env], axis: str, level: int, scenes: int) -> Sequence[float]:
    """Return the share of scenes in which everything is visible, for each set of cameras."""
    counts = np.zeros(len(CAMERAS))
    cells = list(env_of)
    for number in range(scenes):
        (robot, task), seed = cells[number % len(cells)], 100 + number
        env = env_of[robot, task]
        variation = PLAIN if axis == "plain" else perturbation(axis, level, robot, task, seed)
        env.reset(seed=seed, options={"variation": variation})
        seen = seen_by(env)
        wanted = {item.name for item in env.items}
        counts += [wanted <= set().union(*(seen[camera] for camera in some)) for some in CAMERAS.values()]
    return [float(share) for share in counts / scenes]


def main() -> None:
    scenes = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    env_of = {cell: Env(*cell, cameras=()) for cell in product(ROBOTS, SUITE24)}
    print(f"share of {scenes} scenes with object and goal visible, {' / '.join(CAMERAS)} cameras")
    for axis in ("plain", *(axis for axis in AXES if axis != "language")):
        levels = LEVELS if axis != "plain" else LEVELS[:1]
        shares = [share_visible(env_of, axis, level, scenes) for level in levels]
        print(
            f"{axis:12}" + "   ".join("/".join(f"{share:.2f}" for share in row) for row in shares), flush=True
        )
    for env in env_of.values():
        env.close()


if __name__ == "__main__":
    main()
