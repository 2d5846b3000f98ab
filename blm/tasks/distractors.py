"""Distractors: extra coloured objects on the table.

They are visible, but nothing collides with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import mujoco
import numpy as np

from blm.robots import RobotSpec
from blm.tasks.scene import SHAPES
from blm.tasks.spec import PALETTE, Item, Part, Placement, Pose, pose
from blm.types import BlmError

Distractors = tuple[tuple[Item, Pose], ...]
"""Item and pose of each distractor."""
_REACH = 0.22
"""Distractors lie within +- this of the workspace's centre in x and y [m]."""
_ATTEMPTS = 2000
"""Number of positions that are tried."""


def draw_distractors(
    rng: np.random.Generator, robot: RobotSpec, items: Sequence[Item], placement: Placement, count: int
) -> Distractors:
    """Draw `count` distractors that do not overlap in plan.

    Each has another combination of kind and colour.

    Raises BlmError if there is not enough room on the table.
    """
    taken = [(np.array(placement[item.name][0][:2]), radius(item)) for item in items]
    used = {("ball" if item.kind == "sphere" else item.kind, item.color) for item in items}
    choices = [(k, c) for k in ("cube", "ball", "cylinder") for c in PALETTE if (k, c) not in used]
    drawn: list[tuple[Item, Pose]] = []
    for _ in range(_ATTEMPTS):
        if len(drawn) == count or not choices:
            break
        spot = np.array(robot.workspace.centre) + rng.uniform(-_REACH, _REACH, 2)
        half = float(rng.uniform(0.016, 0.024))
        if all(np.linalg.norm(spot - place) > 1.5 * half + size + 0.01 for place, size in taken):
            kind, color = choices.pop(int(rng.integers(len(choices))))
            part = {
                "cube": Part("box", (half, half, half), color),
                "ball": Part("sphere", (half, 0.0, 0.0), color),
                "cylinder": Part("cylinder", (half, half, 0.0), color),
            }[kind]
            item = Item(f"distractor{len(drawn)}", kind, color, (part,), "marker")
            drawn.append((item, pose(spot[0], spot[1], half, float(rng.uniform(0, np.pi)))))
            taken.append((spot, 1.5 * half))
    if len(drawn) < count:
        raise BlmError(
            f"there is no room for {count} distractors next to the task's objects; reduce their number"
        )
    return tuple(drawn)


def show_distractors(model: mujoco.MjModel, distractors: Sequence[tuple[Item, Pose]]) -> None:
    """Set shape, size and colour of the model's distractor bodies, which nothing collides with."""
    for item, _ in distractors:
        geom, part = model.body(item.name).geomadr[0], item.parts[0]
        model.geom_type[geom] = SHAPES[part.shape]
        model.geom_size[geom] = part.size
        model.geom_rgba[geom] = PALETTE[part.color]
        model.geom_rbound[geom] = np.linalg.norm(part.size)
        model.geom_pos[geom] = part.position


def radius(item: Item) -> float:
    """Return the radius of the item's bounding circle in plan [m]."""
    return max(
        np.hypot(*part.position[:2]) + (np.hypot(*part.size[:2]) if part.shape == "box" else part.size[0])
        for part in item.parts
    )
