"""PlaceSphere: put the blue ball into the shallow bin and let go.

After ManiSkill 3.0.1 PlaceSphere-v1.
"""

from __future__ import annotations

import numpy as np

from blm.robots import RobotSpec
from blm.tasks.spec import Item, ObjectState, Part, Placement, Region, TaskSpec, TaskState, pose

RADIUS = 0.02
"""Radius of the ball [m]."""
WALL = 0.0025
"""Half the thickness of the bin's floor and walls [m]; the ball just fits inside."""
_RIM = 0.005
"""Half the height of the bin's walls [m]."""
_BALL_X = (-1.0, -0.5)
"""Range of the ball's initial x in the region, as a multiple of the region's half extent."""
_BIN_X = (0.0, 1.0)
"""The same for the bin; both start anywhere in y."""


def resting_height(ball: ObjectState, tray: ObjectState) -> float:
    """Return the height of the ball's centre above the bin's origin when it lies inside [m]."""
    return ball.size[0] + tray.size[2]


def ball(name: str, color: str) -> Item:
    """Return a ball that just fits into a bin."""
    return Item(name, "ball", color, (Part("sphere", (RADIUS, 0.0, 0.0), color),))


def shallow_bin(name: str, color: str) -> Item:
    """Return a bin with a low rim."""
    outer, off, up = RADIUS + 2 * WALL, RADIUS + WALL, WALL + _RIM
    parts = (
        Part("box", (outer, outer, WALL), color),
        Part("box", (WALL, outer, _RIM), color, (-off, 0.0, up)),
        Part("box", (WALL, outer, _RIM), color, (off, 0.0, up)),
        Part("box", (outer, WALL, _RIM), color, (0.0, -off, up)),
        Part("box", (outer, WALL, _RIM), color, (0.0, off, up)),
    )
    return Item(name, "bin", color, parts, role="fixed")


def _items(robot: RobotSpec) -> tuple[Item, ...]:
    return ball("ball", "blue"), shallow_bin("bin", "white")


def _sample(rng: np.random.Generator, robot: RobotSpec, region: Region) -> Placement:
    (x, y), (dx, dy) = region.centre, region.half
    ball_at = x + dx * rng.uniform(*_BALL_X), y + dy * rng.uniform(-1, 1)
    bin_at = x + dx * rng.uniform(*_BIN_X), y + dy * rng.uniform(-1, 1)
    return {"ball": pose(*ball_at, RADIUS), "bin": pose(*bin_at, WALL)}


def in_bin(state: TaskState, name: str = "bin") -> dict[str, bool]:
    """Return whether the ball lies in a bin, at rest and released."""
    offset = state.offset("ball", name)
    rest = resting_height(state.objects["ball"], state.objects[name])
    on = bool(np.linalg.norm(offset[:2]) <= 0.005 and abs(offset[2] - rest) <= 0.005)
    return state.placed("ball", "is_in_bin", on)


PLACE_SPHERE = TaskSpec(
    name="place_sphere",
    title="Place a ball in a bin",
    items=_items,
    sample=_sample,
    success=in_bin,
    phrasings=(
        "Place the blue ball in the white bin.",
        "Pick up the sphere and put it into the shallow bin.",
        "Drop the blue ball into the small white tray.",
        "Put the ball in the bin and let go.",
    ),
    held_out_phrasings=("The blue sphere belongs in the white box: bring it there.",),
    object="ball",
    goal="bin",
    regions={"widowxai": Region((-0.25, 0.0), (0.1, 0.05))},  # keeps ball and bin apart
)
