"""Control a simulated robot with a checkpoint, and write a video of it.

python examples/act.py --robot widowxai --task push_cube --seed 3 --out act.mp4
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tyro

from blm import BLM
from blm.chunks import ChunkExecutor, ObservationHistory
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
    """Print the result, and write the video."""
    blm = BLM.from_pretrained(model)
    env = Env(robot, task, cameras=blm.contract.cameras, image_size=blm.contract.image_size)
    env.reset(seed=seed)
    executor = ChunkExecutor(blm.contract.execute, hold=env.state())
    history = ObservationHistory(blm.contract)
    frames, solved, steps = [], False, 0
    while steps < max_steps and not solved:
        if executor.decision_due:
            executor.receive(blm.act(history.extend(env.observation())).actions)
        info = env.step(executor.next_action())[4]
        frames.append(env.picture("base", 256))
        steps, solved = steps + 1, solved or bool(info["success"])
    encode(out, np.stack(frames), fps=round(blm.contract.rate_hz))
    print(
        f"{robot}, {env.task_description} {'solved' if solved else 'not solved'} after {steps} steps: {out}"
    )
    env.close()


if __name__ == "__main__":
    tyro.cli(main)
