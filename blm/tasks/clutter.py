"""Clutter of a varied episode: task objects of another size, and solid distractors among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from blm.robots import RobotSpec
from blm.tasks.distractors import Distractors, radius
from blm.tasks.scene import view_centre
from blm.tasks.spec import PALETTE, Item, Part, Pose, SceneDraw, TaskSpec, pose
from blm.tasks.variation import Clutter
from blm.types import BlmError, FloatArray

_REACH = 0.22
"""Distractors lie within +- this of the centre of the view in x and y [m]."""
_CLEARANCES = (0.06, 0.045, 0.03, 0.015)
"""Distances to the task's objects [m]; the next one is tried if there is no room with the last."""
_CORRIDOR = 0.06
"""Distance to the line on which a cube is pushed, and to its extension behind the cube [m]."""
_RUN_UP = 0.08
"""Length of that extension [m]."""
_APART = 0.02
"""Distance between distractors, and to goal markers [m]."""
_ATTEMPTS = 400
"""Number of positions that are tried with each clearance."""


def resize(draw: SceneDraw, scale: float) -> SceneDraw:
    """Return the scene with solid items of `scale` times the size; markers stay as they are.

    Items that rest on the table still do. Items that would overlap move apart in plan.
    """
    if scale == 1:
        return draw
    solid = {item.name for item in draw.items if item.role != "marker"}
    items = tuple(_scaled(item, scale) if item.name in solid else item for item in draw.items)
    poses = {
        name: ((x, y, z * scale if name in solid else z), turn)
        for name, ((x, y, z), turn) in draw.placement.items()
    }
    placed: list[Item] = []
    for item in items:
        if item.name in solid:
            for other in placed:
                poses[item.name] = _apart(poses[item.name], poses[other.name], radius(item) + radius(other))
            placed.append(item)
    return replace(draw, items=items, placement=poses)


def draw_solids(
    rng: np.random.Generator,
    robot: RobotSpec,
    task: TaskSpec,
    draw: SceneDraw,
    ghosts: Distractors,
    clutter: Clutter,
) -> Distractors:
    """Draw solid distractors that stand free, each with another combination of kind and colour.

    Names continue those of the `ghosts`. With `clutter.similar` they share the kind or the colour of a task
    object as long as there are such combinations; otherwise they share neither. Raises BlmError if
    there is not enough room on the table.
    """
    taken = [*ghosts]
    used = {(item.kind, item.color) for item, _ in ghosts}
    count = clutter.distractors
    looks = [look for look in _looks(rng, draw.items, clutter.similar) if look not in used][:count]
    room = _Room(robot, task, draw)
    for kind, color in looks:
        item = _distractor(rng, f"distractor{len(taken)}", kind, color)
        if (spot := room.find(rng, item, taken)) is None:
            break
        where = pose(spot[0], spot[1], _height(item), float(rng.uniform(0, np.pi)))
        taken.append((item, where))
    solids = tuple(taken[len(ghosts) :])
    if len(solids) < count:
        raise BlmError(
            f"there is room for {len(solids)} of {count} solid distractors in this scene of "
            f"'{robot.name}' in '{task.name}'; reduce their number"
        )
    return solids


@dataclass(frozen=True)
class _Room:
    """Where distractors of one scene may lie."""

    robot: RobotSpec
    task: TaskSpec
    draw: SceneDraw

    def find(
        self, rng: np.random.Generator, item: Item, taken: Sequence[tuple[Item, Pose]]
    ) -> FloatArray | None:
        """Return a free spot [2] for an item, or None."""
        size = radius(item)
        for clearance in _CLEARANCES:
            for _ in range(_ATTEMPTS):
                spot = np.array(view_centre(self.robot, self.task)) + rng.uniform(-_REACH, _REACH, 2)
                others = (np.linalg.norm(spot - np.array(at[0][:2])) - radius(other) for other, at in taken)
                if all(gap > size + _APART for gap in others) and self._is_free(spot, size, clearance):
                    return spot
        return None

    def _is_free(self, spot: FloatArray, size: float, clearance: float) -> bool:
        """Whether a disc of this size at `spot` is clear of items and goals, and of a push's path."""
        where = self.draw.placement
        for item in self.draw.items:
            low = item.role != "marker" or where[item.name][0][2] < 0.1
            required = clearance if item.role != "marker" else _APART
            if low and _distance(spot, item, where[item.name]) < size + required:
                return False
        if self.task.prehensile:
            return True
        start = np.array(where[self.task.object][0][:2])
        goals = [np.array(where[i.name][0][:2]) for i in self.draw.items if i.name != self.task.object]
        return all(_from_push(spot, start, goal) > size + _CORRIDOR for goal in goals)


def _scaled(item: Item, scale: float) -> Item:
    return replace(
        item,
        parts=tuple(
            replace(part, size=_times(part.size, scale), position=_times(part.position, scale))
            for part in item.parts
        ),
    )


def _times(vector: tuple[float, float, float], scale: float) -> tuple[float, float, float]:
    x, y, z = vector
    return x * scale, y * scale, z * scale


def _apart(here: Pose, other: Pose, distance: float) -> Pose:
    """Move `here` straight away from `other` until their centres are `distance` apart in plan [m]."""
    (x, y, z), turn = here
    offset = np.subtract(here[0][:2], other[0][:2])
    gap = float(np.linalg.norm(offset))
    if gap >= distance:
        return here
    x, y = np.array(other[0][:2]) + offset / gap * distance
    return (float(x), float(y), z), turn


def _looks(rng: np.random.Generator, items: Sequence[Item], similar: bool) -> list[tuple[str, str]]:
    """Return combinations of kind and colour that no item has, in random order, the fitting ones first."""
    kinds = {item.kind for item in items if item.role != "marker"}
    colors = {part.color for item in items for part in item.parts}
    used = {("ball" if item.kind == "sphere" else item.kind, item.color) for item in items}
    every = [(kind, c) for kind in ("cube", "ball", "cylinder") for c in PALETTE if (kind, c) not in used]
    every = [every[index] for index in rng.permutation(len(every))]
    return sorted(every, key=lambda look: (look[0] in kinds or look[1] in colors) != similar)


def _distractor(rng: np.random.Generator, name: str, kind: str, color: str) -> Item:
    half = float(rng.uniform(0.015, 0.024))
    part = {
        "cube": Part("box", (half, half, half), color),
        "ball": Part("sphere", (half, 0.0, 0.0), color),
        "cylinder": Part("cylinder", (half, half * float(rng.uniform(0.7, 1.4)), 0.0), color),
    }[kind]
    return Item(name, kind, color, (part,))


def _height(item: Item) -> float:
    """Return the height of the centre of a distractor that stands on the table [m]."""
    part = item.parts[0]
    return {"box": part.size[2], "sphere": part.size[0], "cylinder": part.size[1]}[part.shape]


def _distance(spot: FloatArray, item: Item, where: Pose) -> float:
    """Return the distance in plan from a spot [2] to an item that stands or lies on the table [m]."""
    (x, y, _), (w, _, _, z) = where
    yaw = 2 * np.arctan2(z, w)
    dx, dy = spot[0] - x, spot[1] - y
    local = np.array([np.cos(yaw) * dx + np.sin(yaw) * dy, -np.sin(yaw) * dx + np.cos(yaw) * dy])
    gaps = []
    for part in item.parts:
        offset = np.abs(local - part.position[:2])
        if part.shape == "box":
            gaps.append(float(np.linalg.norm(np.maximum(offset - part.size[:2], 0.0))))
        else:
            gaps.append(float(np.linalg.norm(offset)) - part.size[0])
    return min(gaps)


def _from_push(spot: FloatArray, start: FloatArray, goal: FloatArray) -> float:
    """Return the distance of a spot [2] from the path of a push from `start` to `goal` [m]."""
    way = goal - start
    length = float(np.linalg.norm(way))
    along = float(np.clip((spot - start) @ way / length, -_RUN_UP, length))
    return float(np.linalg.norm(spot - start - along * way / length))
