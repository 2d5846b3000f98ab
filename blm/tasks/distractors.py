"""Extra coloured things on the table, for questions about a scene. Seen only: nothing touches them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mujoco
import numpy as np

from blm.robots import RobotSpec
from blm.tasks.scene import SHAPES
from blm.tasks.spec import PALETTE, Item, Part, Placement, Pose, yaw_quaternion
from blm.types import BlmError

_KINDS = {"cube": "box", "ball": "sphere", "cylinder": "cylinder"}
_REACH = 0.22
"""Distractors lie within +- this of the workspace's centre, in x and y [m]."""
_ATTEMPTS = 2000


@dataclass(frozen=True)
class Distractor:
    """Looks and place of one distractor."""

    kind: str
    color: str
    part: Part
    pose: Pose


def draw_distractors(
    rng: np.random.Generator, robot: RobotSpec, items: Sequence[Item], placement: Placement, count: int
) -> tuple[Distractor, ...]:
    """Draw `count` things that overlap nothing in plan; no two things share both kind and colour.

    Raises BlmError when the table is too full.
    """
    taken = [(np.array(placement[item.name][0][:2]), _radius(item)) for item in items]
    said = {("ball" if item.kind == "sphere" else item.kind, item.color) for item in items}
    choices = [(kind, color) for kind in _KINDS for color in PALETTE if (kind, color) not in said]
    drawn: list[Distractor] = []
    for _ in range(_ATTEMPTS):
        if len(drawn) == count or not choices:
            break
        spot = np.array(robot.workspace.centre) + rng.uniform(-_REACH, _REACH, 2)
        half = float(rng.uniform(0.016, 0.024))
        if all(np.linalg.norm(spot - place) > 1.5 * half + radius + 0.01 for place, radius in taken):
            kind, color = choices.pop(int(rng.integers(len(choices))))
            size = {"cube": (half, half, half), "ball": (half, 0.0, 0.0), "cylinder": (half, half, 0.0)}[kind]
            pose = ((float(spot[0]), float(spot[1]), half), yaw_quaternion(float(rng.uniform(0, np.pi))))
            drawn.append(Distractor(kind, color, Part(_KINDS[kind], size, color), pose))  # type: ignore[arg-type]
            taken.append((spot, 1.5 * half))
    if len(drawn) < count:
        raise BlmError(f"no room for {count} distractors beside the task's objects; ask for fewer")
    return tuple(drawn)


def dress(model: mujoco.MjModel, data: mujoco.MjData, distractors: Sequence[Distractor]) -> None:
    """Give the model's distractor bodies these looks and places."""
    for index, thing in enumerate(distractors):
        body, part = model.body(f"distractor{index}"), thing.part
        geom = body.geomadr[0]
        model.geom_type[geom], model.geom_size[geom] = SHAPES[part.shape], part.size
        model.geom_rgba[geom], model.geom_rbound[geom] = PALETTE[part.color], np.linalg.norm(part.size)
        model.geom_pos[geom] = part.position
        data.mocap_pos[body.mocapid[0]], data.mocap_quat[body.mocapid[0]] = thing.pose


def _radius(item: Item) -> float:
    """Radius of a circle around the item's origin that holds it in plan."""
    return max(
        np.hypot(*part.position[:2]) + (np.hypot(*part.size[:2]) if part.shape == "box" else part.size[0])
        for part in item.parts
    )
