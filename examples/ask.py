"""Ask a checkpoint a question about a simulated scene, and save the images that it saw.

python examples/ask.py --question "Point to the red cube in the base view." --task pick_cube --robot xarm6
"""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import tyro

from blm import BLM, Image, Message
from blm.tasks import Env


def main(
    question: str = "What is the position of the red cube in cm?",
    model: str = "blm-nano",
    robot: str = "panda",
    task: str = "pick_cube",
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Print the answer; with `out`, write the images side by side."""
    blm = BLM.from_pretrained(model)
    env = Env(robot, task, cameras=blm.contract.cameras, image_size=blm.contract.image_size)
    env.reset(seed=seed)
    views = list(env.observation().images.values())
    print(f"{robot}, {env.task_description}\n{question}")
    print(blm.answer([Message("user", (*map(Image, views), question))]))
    if out is not None:
        sheet = PIL.Image.new("RGB", (sum(view.shape[1] for view in views), views[0].shape[0]))
        for place, view in enumerate(views):
            sheet.paste(PIL.Image.fromarray(view), (place * view.shape[1], 0))
        sheet.save(out)
        print(f"images: {out}")
    env.close()


if __name__ == "__main__":
    tyro.cli(main)
