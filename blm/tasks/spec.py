"""Task specifications as data: objects, initial states, success rule and instructions.

Sizes and regions come from `robot.workspace`, so a task works for every robot. A success rule only
sees numbers and needs no simulator. World frame (x forward from the robot, y left, z up), m, rad,
quaternions wxyz. `suite_version` hashes the representation of items and regions, so the names of
their classes and fields are part of the suite's version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from blm.robots import RobotSpec
from blm.types import BlmError, FloatArray

Vector = tuple[float, float, float]
Pose = tuple[Vector, tuple[float, float, float, float]]
Placement = Mapping[str, Pose]
"""Item name -> position, quaternion."""
STATIC_SPEED = 0.2
"""A robot is static if all its joints are slower than this [rad/s] (ManiSkill, is_static)."""
PALETTE = {
    "red": (0.85, 0.10, 0.10, 1.0),
    "green": (0.10, 0.75, 0.20, 1.0),
    "blue": (0.10, 0.25, 0.85, 1.0),
    "yellow": (0.95, 0.82, 0.10, 1.0),
    "orange": (0.95, 0.50, 0.05, 1.0),
    "purple": (0.55, 0.20, 0.70, 1.0),
    "pink": (0.95, 0.55, 0.70, 1.0),
    "cyan": (0.10, 0.75, 0.80, 1.0),
    "white": (0.95, 0.95, 0.95, 1.0),
}


MARKERS = ("sphere", "disc")
"""Kinds of goal markers, which are not objects and are referred to by name only."""


@dataclass(frozen=True)
class Part:
    """One primitive shape of an item, in the item's frame."""

    shape: Literal["box", "sphere", "cylinder"]
    size: Vector
    """Half extents of a box; (radius, 0, 0) of a sphere; (radius, half height, 0) of a cylinder."""
    color: str
    """A name of `PALETTE`."""
    position: Vector = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Item:
    """One object or marker of the scene."""

    name: str
    kind: str
    """Its kind in instructions and questions: cube, ball, disc, peg, bin..."""
    color: str
    parts: tuple[Part, ...]
    role: Literal["free", "fixed", "marker"] = "free"
    """Free items obey physics, fixed ones collide, markers are only visible."""


ON_TABLE = 0.005
"""Maximum height of an object above the table on which it lies [m]."""


@dataclass(frozen=True)
class Region:
    """A rectangle on the table."""

    centre: tuple[float, float]
    half: tuple[float, float]
    """Half extents along x and y [m]."""

    def draw(self, rng: np.random.Generator) -> tuple[float, float]:
        """Return x, y, uniform in the rectangle."""
        x, y = np.array(self.centre) + np.array(self.half) * rng.uniform(-1, 1, size=2)
        return float(x), float(y)


@dataclass(frozen=True, eq=False)
class ObjectState:
    """The present state of one item."""

    name: str
    kind: str
    color: str
    position: FloatArray
    quaternion: FloatArray
    size: Vector = (0.0, 0.0, 0.0)
    """Size of its first part; see `Part.size`."""
    speed: float = 0.0
    """Speed of its centre [m/s]."""
    spin: float = 0.0
    """Angular speed [rad/s]."""

    @property
    def label(self) -> str:
        """Its name in questions: colour and kind, or the name of a goal marker."""
        return self.name.replace("_", " ") if self.kind in MARKERS else f"{self.color} {self.kind}"

    @property
    def is_static(self) -> bool:
        """Whether it is at rest, by ManiSkill's thresholds (0.01 m/s, 0.5 rad/s)."""
        return self.speed <= 0.01 and self.spin <= 0.5


@dataclass(frozen=True, eq=False)
class SceneDraw:
    """The scene of one episode."""

    items: tuple[Item, ...]
    """Items of the same names, roles and shapes as `TaskSpec.items`; only their colours are drawn."""
    placement: Placement
    words: Mapping[str, str] = field(default_factory=dict)
    """Words that fill the slots of the instruction, e.g. "color" -> "yellow"."""
    other_words: Mapping[str, str] = field(default_factory=dict)
    """Words of the instruction that names the other thing of the same scene; empty if there is none."""


@dataclass(frozen=True, eq=False)
class TaskState:
    """The state that a success rule judges."""

    robot: RobotSpec
    objects: Mapping[str, ObjectState]
    robot_speed: float
    """Maximum arm joint speed [rad/s]."""
    grasped: frozenset[str]
    """Names of the grasped objects."""
    start: Mapping[str, FloatArray] = field(default_factory=dict)
    """Position of each item at the start of the episode, [3]."""

    def displacement(self, name: str) -> FloatArray:
        """Return the present position of `name` minus that at the start, [3]."""
        return self.objects[name].position - self.start[name]

    def offset(self, name: str, other: str) -> FloatArray:
        """Return the position of `name` minus that of `other`, [3]."""
        return self.objects[name].position - self.objects[other].position

    def placed(self, name: str, condition: str, in_place: bool) -> dict[str, bool]:
        """Return the conditions of a placing task: in place, at rest and released.

        `condition` names the first of them.
        """
        static = self.objects[name].is_static
        grasped = name in self.grasped
        done = in_place and static and not grasped
        return {condition: in_place, f"is_{name}_static": static, "is_grasped": grasped, "success": done}


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task for every robot."""

    name: str
    title: str
    items: Callable[[RobotSpec], tuple[Item, ...]]
    sample: Callable[[np.random.Generator, RobotSpec, Region], Placement]
    """Draws the initial poses, those of movable items within the region."""
    success: Callable[[TaskState], dict[str, bool]]
    """Returns named conditions; one of them is "success"."""
    phrasings: tuple[str, ...]
    """Instructions used in training and by default."""
    held_out_phrasings: tuple[str, ...]
    """Instructions kept for evaluation; their indices follow those of `phrasings`."""
    object: str
    """Name of the item that the task moves."""
    goal: str = ""
    """Name of the item to which it is moved; empty for none."""
    prehensile: bool = True
    """Whether that item must be grasped."""
    regions: Mapping[str, Region] = field(default_factory=dict)
    """Robot name -> spawn region, for arms that cannot do the task in their whole workspace."""
    scene: Callable[[np.random.Generator, RobotSpec, Region], SceneDraw] | None = None
    """Draws colours and words as well as poses; None for a task whose scenes differ in poses only."""
    swap: Mapping[str, str] = field(default_factory=dict)
    """Item -> the item in its place if the instruction names the other thing.

    An item in its own place is turned end for end.
    """
    wrong: Callable[[TaskState], bool] | None = None
    """Whether the robot has done the task with another thing than the named one, or moved that.

    The environment remembers it: the episode cannot succeed afterwards.
    """
    chance: float = 1.0
    """Success rate of a policy that masters the motions and ignores the words."""
    view_shift: float = 0.0
    """Shift of the third-person cameras along x that keeps the task in view [m]."""
    max_steps: int = 200
    """Step limit. ManiSkill registers 50, which is shorter than its own demonstrations."""

    def is_settled(self, thing: ObjectState) -> bool:
        """Whether the item that the task moves is at rest, and on the table if it is moved there.

        ManiSkill's rules do not all ask for it: a cube may fly over the target, a peg swing through
        the vertical.
        """
        low = thing.position[2] < thing.size[2] + ON_TABLE
        return bool(thing.is_static and (low or self.prehensile))

    def region(self, robot: RobotSpec) -> Region:
        """Return the spawn region of a robot: its entry in `regions`, or its whole workspace."""
        area = robot.workspace
        return self.regions.get(robot.name, Region(area.centre, (area.half, area.half)))

    def draw(self, rng: np.random.Generator, robot: RobotSpec) -> SceneDraw:
        """Draw the scene of an episode."""
        region = self.region(robot)
        if self.scene is not None:
            return self.scene(rng, robot, region)
        return SceneDraw(self.items(robot), self.sample(rng, robot, region))

    def instruction(self, index: int) -> str:
        """Return phrasing `index`, held-out ones counted last; its slots are not filled.

        Raises BlmError when out of range.
        """
        every = self.phrasings + self.held_out_phrasings
        seen = len(self.phrasings)
        if not 0 <= index < len(every):
            raise BlmError(
                f"task '{self.name}' has no phrasing {index}; valid: 0..{seen - 1} (training), "
                f"{seen}..{len(every) - 1} (held out)"
            )
        return every[index]


def exchange(objects: Mapping[str, ObjectState], swap: Mapping[str, str]) -> dict[str, ObjectState]:
    """Return the objects by their part in the instruction that `swap` leads to; see `TaskSpec.swap`."""
    exchanged = {name: objects[swap.get(name, name)] for name in objects}
    for name in (name for name, other in swap.items() if name == other):
        w, x, y, z = objects[name].quaternion
        exchanged[name] = replace(objects[name], quaternion=np.array([-z, y, -x, w]))  # half a turn about z
    return exchanged


def pose(x: float, y: float, z: float, yaw: float = 0.0) -> Pose:
    """Return position [m] and quaternion of an item rotated by `yaw` [rad] about the vertical."""
    return (float(x), float(y), float(z)), (float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2)))


def cube(name: str, color: str, half: float) -> Item:
    """Return a cube with half edge length `half` [m]."""
    return Item(name, "cube", color, (Part("box", (half, half, half), color),))
