"""A tiny backbone and data set for Stage II."""

from pathlib import Path

import numpy as np

from blm.backbone.backbone import Backbone
from blm.backbone.nano.model import make_nano
from blm.datasets.lerobot import finalize_dataset, open_dataset, stage_episode
from blm.types import ActionSpace, Episode

SIDE = 32


def make_dataset(
    folder: Path,
    robot: str = "arm",
    joints: int = 2,
    lengths: tuple[int, ...] = (19, 22, 20),
    tasks: tuple[str, ...] = ("reach",),
):
    """A robot whose joints go a quarter of the way, each step, to where its picture shows a dot."""
    space = ActionSpace(
        robot=robot,
        names=(*(f"j{i}" for i in range(joints)), "gripper"),
        units=("rad",) * joints + ("opening",),
        low=(-2.0,) * joints + (0.0,),
        high=(2.0,) * joints + (1.0,),
    )
    staged = []
    for seed, length in enumerate(lengths):
        rng = np.random.default_rng(seed)
        goal, states = rng.uniform(-1, 1, joints + 1), np.zeros((length + 1, joints + 1))
        goal[-1] = float(goal[-1] > 0)
        images = np.full((length, SIDE, SIDE, 3), 40, np.uint8)
        column = int((goal[0] + 1) / 2 * (SIDE - 8))
        for t in range(length):
            states[t + 1] = states[t] + 0.25 * (goal - states[t])
            images[t, 8:16, column : column + 8] = 230
        episode = Episode(
            robot=robot,
            task=tasks[seed % len(tasks)],
            seed=seed,
            instruction=("reach the dot", "go to the bright dot now")[seed % 2],
            states=states[:-1].astype(np.float32),
            actions=states[1:].astype(np.float32),
            images={"base": images, "wrist": images[:, ::-1]},
        )
        stage_episode(folder / "staging", f"{robot}-{seed}", episode)
        staged.append(folder / "staging" / f"{robot}-{seed}")
    finalize_dataset(
        staged, folder / robot, space=space, cameras=("base", "wrist"), image_size=SIDE, provenance={}
    )
    return open_dataset(folder / robot)


def make_backbone(folder: Path, seed: int = 0) -> Backbone:
    Backbone(*make_nano(seed=seed, layers=2, width=32)).save(folder)
    return Backbone.load(folder)
