"""Render docs/figures/arms.gif: `blm-nano` controls the four arms on validation scenes that it solves.

python docs/figures/make_arms.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from blm import BLM
from blm.evaluation.protocol import VALIDATION_SEEDS
from blm.tasks import Env
from blm.types import ImageArray, decision_seed

OUT = Path(__file__).with_name("arms.gif")
CELLS = (
    ("panda", "stack_cube"),
    ("xarm6", "place_sphere"),
    ("xarm7", "pick_cube"),
    ("widowxai", "lift_peg_upright"),
)
SIZE, STEPS, EVERY = 200, 110, 3
"""Side of one image [px], number of control steps, and number of control steps per frame."""


def film(model: BLM, robot: str, task: str) -> list[ImageArray]:
    """Return the frames of the first validation scene of a cell in which success holds at the last step."""
    for seed in VALIDATION_SEEDS[:10]:
        env = Env(robot, task, cameras=model.contract.cameras, terminate_on_success=False)
        env.reset(seed=seed)
        frames, solved, step = list[ImageArray](), False, 0
        while step < STEPS:
            chunk = model.act(env.observation(seed=decision_seed(seed, step))).actions
            for action in chunk[: model.contract.execute]:
                if step % EVERY == 0:
                    frames.append(env.picture("base", SIZE))
                solved = bool(env.step(action)[4]["success"])
                step += 1
        env.close()
        if solved:
            return frames
    raise SystemExit(f"{robot} {task}: no success at step {STEPS} in any of ten scenes")


def main() -> None:
    model = BLM.from_pretrained("blm-nano")
    columns = [film(model, robot, task) for robot, task in CELLS]
    strip = [Image.fromarray(np.concatenate(frames, axis=1)) for frames in zip(*columns, strict=True)]
    palette = strip[len(strip) // 2].quantize(128)  # one palette: no flicker
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in strip]
    frames[0].save(OUT, save_all=True, append_images=frames[1:], duration=100, loop=0, optimize=True)
    print(f"{OUT}: {len(frames)} frames, {OUT.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
