"""Small episodes, and a dataset of them."""

from __future__ import annotations

import numpy as np

from blm.datasets.lerobot import finalize_dataset, stage_episode
from blm.types import ActionSpace, Episode

SIDE = 64

SPACE = ActionSpace(
    robot="arm",
    names=("j1", "j2", "gripper"),
    units=("rad", "rad", "opening"),
    low=(-1.0, -1.0, 0.0),
    high=(1.0, 1.0, 1.0),
)


def numbered_frames(numbers):
    """Return pictures that encode their number as a 4 x 4 grid of dark and bright blocks."""
    bits = np.array([[(n >> k) & 1 for k in range(16)] for n in numbers], np.uint8).reshape(-1, 4, 4)
    grey = np.kron(40 + 170 * bits, np.ones((1, SIDE // 4, SIDE // 4), np.uint8))
    return np.stack([grey, grey, grey // 2], axis=-1)


def make_episode(seed, length, task="push", instruction="push it"):
    rng = np.random.default_rng(seed)
    numbers = [seed * 100 + t for t in range(length)]
    return Episode(
        robot="arm",
        task=task,
        seed=seed,
        instruction=instruction,
        states=rng.normal(size=(length, 3)).astype(np.float32),
        actions=rng.normal(size=(length, 3)).astype(np.float32),
        executed=None if seed == 1 else rng.normal(size=(length, 3)).astype(np.float32),
        images={"base": numbered_frames(numbers), "wrist": numbered_frames(numbers)[:, ::-1]},
        primitives=("approach",) * (length - 3) + ("push",) * 3,
        metrics={"success_step": length - 4, "return": 1.5},
    )


EPISODES = [
    make_episode(3, 9),
    make_episode(1, 12, instruction="move it"),
    make_episode(2, 7, task="pick", instruction="pick"),
]


def write(folder, episodes):
    staged = [stage_episode(folder / "staging", f"{e.task}/{e.seed}", e) for e in episodes]
    layout = {"space": SPACE, "cameras": ("base", "wrist"), "image_size": SIDE}
    return finalize_dataset(staged, folder / "arm", provenance={"suite": "1"}, **layout)
