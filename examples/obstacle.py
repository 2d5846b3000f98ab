"""Plan around an obstacle: carry the cube over a wall, and write a video of it.

    python examples/obstacle.py --out wall.mp4 --robot xarm6 --seed 3

The task is PickCube with one more item, a fixed wall between the cube and the goal. The expert's
primitives ignore it: the planner finds paths that keep the arm and the carried cube clear of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import tyro

from blm.datasets.video import encode
from blm.planner import Expert
from blm.planner.decompositions import DECOMPOSITIONS, KEY_POSES
from blm.robots import RobotSpec
from blm.tasks import TASKS, Env, TaskSpec
from blm.tasks.spec import Item, Part, Placement, Region, pose

NAME = "pick_cube_over_wall"
WALL = (0.15, 0.01, 0.06)
"""Half extents of the wall [m]."""


def wall_task() -> TaskSpec:
    """Return PickCube with a wall along x; the cube starts on one side, the goal is on the other.

    The goal is low.
    """
    pick = TASKS["pick_cube"]
    wall = Item("wall", "wall", "white", (Part("box", WALL, "white"),), role="fixed")

    def sample(rng: np.random.Generator, robot: RobotSpec, region: Region) -> Placement:
        (x, y), (dx, dy), half = region.centre, region.half, robot.workspace.cube_half
        side, yaw = rng.choice((-1.0, 1.0)), rng.uniform(0, 2 * np.pi)
        along, across = 0.5 * dx * rng.uniform(-1, 1, 2), dy * rng.uniform(0.8, 1.2, 2)
        return {
            "cube": pose(x + along[0], y - side * across[0], half, yaw),
            "goal": pose(x + along[1], y + side * across[1], half + 0.03),
            "wall": pose(x, y, WALL[2]),
        }

    return replace(pick, name=NAME, items=lambda robot: (*pick.items(robot), wall), sample=sample)


def touches_wall(env: Env) -> bool:
    """Return whether anything is in contact with the wall."""
    contacts = env.data.contact
    bodies = env.model.geom_bodyid[contacts.geom]
    return bool(((bodies == env.model.body("wall").id).any(axis=1) & (contacts.dist < 0)).any())


def main(out: Path, robot: str = "panda", seed: int = 0) -> None:
    """Write the video to `out`, and print the result."""
    TASKS[NAME], DECOMPOSITIONS[NAME], KEY_POSES[NAME] = (
        wall_task(),
        DECOMPOSITIONS["pick_cube"],
        KEY_POSES["pick_cube"],
    )
    env = Env(robot, NAME, cameras=(), terminate_on_success=False)
    expert = Expert(env, np.random.default_rng(seed))
    _, info = env.reset(seed=seed)
    expert.check()
    frames, touched = [env.render()], False
    while not expert.done and len(frames) < TASKS[NAME].max_steps:
        action, _ = expert.act()
        _, _, _, _, info = env.step(action)
        touched |= touches_wall(env)
        frames.append(env.render())
    encode(out, np.stack(frames), fps=20)
    print(f"{out}: {len(frames)} frames; success {info['success']}, wall touched {touched}")
    print({name: round(value, 2) for name, value in expert.metrics().items() if value})
    env.close()


if __name__ == "__main__":
    tyro.cli(main)
