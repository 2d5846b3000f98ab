"""Let a checkpoint drive a simulated robot, and watch it.

python examples/act.py --robot widowxai --task push_cube --seed 3 --out act.mp4
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tyro

from blm import BLM
from blm.datasets.video import encode
from blm.tasks import Env


def main(
    model: str = "blm-nano",
    robot: str = "panda",
    task: str = "push_cube",
    seed: int = 0,
    max_steps: int = 200,
    out: Path = Path("act.mp4"),
) -> None:
    """Print how it went, and write the video."""
    blm = BLM.from_pretrained(model)
    env = Env(robot, task, cameras=blm.contract.cameras, image_size=blm.contract.image_size)
    env.reset(seed=seed)
    frames, solved, steps = [], False, 0
    while steps < max_steps and not solved:
        chunk = blm.act(env.observation())
        for action in chunk.actions[: blm.contract.execute]:
            info = env.step(action)[4]
            frames.append(env.picture("base", 256))
            steps, solved = steps + 1, solved or bool(info["success"])
    encode(out, np.stack(frames), fps=round(chunk.rate_hz))
    print(
        f"{robot}, {env.task_description} {'solved' if solved else 'not solved'} after {steps} steps: {out}"
    )
    env.close()


if __name__ == "__main__":
    tyro.cli(main)
