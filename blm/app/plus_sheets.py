"""Sheets of suite24-plus: what a policy sees in one scene on every axis and level."""

from __future__ import annotations

from contextlib import closing
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw

from blm.app.viewing import GAP, INK, PALE, font, save_png
from blm.robots import ROBOTS
from blm.tasks import TASKS, Env
from blm.tasks.scene import CAMERAS
from blm.tasks.suite_plus import AXES, LEVELS, perturbation
from blm.tasks.variation import PLAIN

_SIDE = 112
"""Side of an image [px]: what the policies see, not enlarged."""
_LABEL, _HEAD = 120, 30
"""Width of the labels of rows and height of those of columns [px]."""
_ROWS = ("plain", *(axis for axis in AXES if axis != "language"))


def write_plus_sheets(folder: Path, seed: int) -> Path:
    """Write `folder/ROBOT-TASK.png` for all robots and tasks, of the scene `seed`; return the folder.

    A row is an axis and a column a level. Its images are those of all cameras at the start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for robot, task in product(ROBOTS, TASKS):
        with closing(Env(robot, task, cameras=CAMERAS, image_size=_SIDE)) as env:
            save_png(plus_sheet(env, seed), folder / f"{robot}-{task}.png")
    return folder


def plus_sheet(env: Env, seed: int) -> Image.Image:
    """Return the sheet of one robot and task."""
    width = len(env.cameras) * (_SIDE + 2) + 2 * GAP
    size = (_LABEL + len(LEVELS) * width, _HEAD + len(_ROWS) * (_SIDE + GAP))
    sheet = Image.new("RGB", size, PALE)
    draw = ImageDraw.Draw(sheet)
    for column, level in enumerate(LEVELS):
        x = _LABEL + column * width
        draw.text((x + width // 2, _HEAD // 2), f"level {level}", INK, font(17), anchor="mm")
        for row, axis in enumerate(_ROWS):
            y = _HEAD + row * (_SIDE + GAP)
            draw.text((GAP, y + _SIDE // 2), axis, INK, font(17), anchor="lm")
            robot, task = env.embodiment, env.task
            variation = PLAIN if axis == "plain" else perturbation(axis, level, robot, task, seed)
            pictures = env.reset(seed=seed, options={"variation": variation})[0]["pixels"]
            for number, picture in enumerate(pictures.values()):
                sheet.paste(Image.fromarray(picture), (x + number * (_SIDE + 2), y))
    return sheet
