"""suite24-plus as data: seven axes of variation, each in five levels, and conditions of the dynamics.

A level states amounts; signs, directions, colours and patterns of a scene are drawn from a generator
that is seeded by axis, level, robot, task and scene. So a scene looks the same for every policy, and
each has an unperturbed twin: the plain scene of the same seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from blm.robots import ROBOTS
from blm.tasks.randomization import TEST_PATTERNS, TRAINING_PATTERNS
from blm.tasks.registry import TASKS
from blm.tasks.scene import TABLE_COLOR, WALL_COLOR
from blm.tasks.spec import PALETTE
from blm.tasks.task_env import draw_scene
from blm.tasks.variation import (
    PLAIN,
    CameraShift,
    Clutter,
    Dynamics,
    Lighting,
    Pattern,
    SensorNoise,
    Surface,
    Variation,
    Vector,
)
from blm.types import FloatArray, lookup

AXES: tuple[str, ...] = ("camera", "light", "background", "layout", "start", "sensors", "language")
LEVELS = (1, 2, 3, 4, 5)
_DRAWING = 1
"""Increase it if the way in which scenes are drawn from the levels changes."""
_CONTRAST = 0.35
"""Minimum distance of a drawn table colour from the colours of the task's things, in RGB of 0..1."""
_ONLY_SMALLER = (("widowxai", "lift_peg_upright"),)
"""Robot and task whose object never grows: this arm cannot lift a longer peg clear of the table."""
_DRAWS = 64
"""Number of colours of which one is chosen."""
_GOAL_MOVES_AT, _GOAL_MOVES_BY, _GOAL_KEEPS = 15, 0.06, 0.09
"""Control step, distance [m], and distance that a moved goal keeps from the object [m]."""


@dataclass(frozen=True)
class CameraLevel:
    """Third-person cameras."""

    azimuth: float
    """Rotation about the centre of the view, to either side [deg]."""
    position: float
    """Distance of a move in a random direction [m]."""
    zoom: float
    """Relative change of the field of view, to either side."""


@dataclass(frozen=True)
class LightLevel:
    """Light."""

    brightness: float
    """Factor of all lights."""
    direction: float
    """Rotation of the lamp about both horizontal axes, each to either side [deg]."""
    warmth: float
    """Colour temperature, to either side; see `Lighting.warmth`."""
    shadows: bool


@dataclass(frozen=True)
class BackgroundLevel:
    """Table and wall."""

    change: float
    """Maximum change of each colour channel, 0..1."""
    patterns: tuple[Pattern, ...] = ("",)
    """Patterns of which the table and the wall each have one."""


@dataclass(frozen=True)
class LayoutLevel:
    """Objects. In scenes with odd seeds distractors resemble the task's objects."""

    distractors: int
    change: float
    """Relative change of the size of the task's objects, and change of their colour channels."""


@dataclass(frozen=True)
class StartLevel:
    """Initial arm pose."""

    offset: float
    """Norm of the offset of the joint positions [rad]."""


@dataclass(frozen=True)
class SensorLevel:
    """Cameras and joint encoders; all errors occur together."""

    blur: float
    """Standard deviation [px of 112]."""
    pixel_noise: float
    """Standard deviation [0..255]."""
    jpeg_quality: int
    exposure: float
    """Relative change of the exposure, to either side."""
    dropped: float
    """Probability that a camera delivers its previous picture."""
    joints: float
    """Standard deviation of the noise of joint readings [rad]."""


CAMERA = (
    CameraLevel(3, 0.01, 0.02),
    CameraLevel(6, 0.02, 0.04),
    CameraLevel(10, 0.04, 0.06),
    CameraLevel(15, 0.06, 0.08),
    CameraLevel(20, 0.08, 0.10),
)
LIGHT = (
    LightLevel(0.9, 5, 0.1, False),
    LightLevel(0.8, 10, 0.2, False),
    LightLevel(0.65, 20, 0.4, True),
    LightLevel(0.5, 30, 0.5, True),
    LightLevel(1.5, 40, 0.5, True),
)
BACKGROUND = (
    BackgroundLevel(0.08),
    BackgroundLevel(0.25),
    BackgroundLevel(0.25, TRAINING_PATTERNS),
    BackgroundLevel(1.0, TRAINING_PATTERNS),
    BackgroundLevel(1.0, TEST_PATTERNS),
)
LAYOUT = (
    LayoutLevel(1, 0.05),
    LayoutLevel(2, 0.08),
    LayoutLevel(4, 0.12),
    LayoutLevel(6, 0.16),
    LayoutLevel(10, 0.20),
)
START = (StartLevel(0.1), StartLevel(0.2), StartLevel(0.3), StartLevel(0.4), StartLevel(0.5))
SENSORS = (
    SensorLevel(0.3, 4.0, 80, 0.05, 0.02, 0.005),
    SensorLevel(0.5, 8.0, 60, 0.10, 0.05, 0.010),
    SensorLevel(0.7, 12.0, 45, 0.20, 0.10, 0.015),
    SensorLevel(0.9, 18.0, 30, 0.30, 0.15, 0.020),
    SensorLevel(1.2, 25.0, 20, 0.40, 0.20, 0.030),
)
DYNAMICS: Mapping[str, Dynamics] = {
    "mass_half": Dynamics(mass=0.5),
    "mass_double": Dynamics(mass=2.0),
    "friction_half": Dynamics(friction=0.5),
    "friction_double": Dynamics(friction=2.0),
    "grip_half": Dynamics(grip_force=0.5),
    "grip_double": Dynamics(grip_force=2.0),
    "delay_1": Dynamics(delay=1),
    "delay_2": Dynamics(delay=2),
    "delay_3": Dynamics(delay=3),
    "rate_10hz": Dynamics(hold=2),
    "moved_goal": Dynamics(move_goal_at=_GOAL_MOVES_AT),
}
"""Condition -> what it changes; the displacement of a moved goal is drawn for each scene."""


def perturbation(axis: str, level: int, robot: str, task: str, seed: int) -> Variation:
    """Return the variation of one scene; "language" changes words only and gives the plain suite.

    Raises BlmError for an unknown axis, level, robot or task.
    """
    lookup("axis", axis, dict.fromkeys(AXES))
    lookup("level", str(level), {str(known): 0 for known in LEVELS})
    scene = _Scene(robot, task, seed, _generator(axis, level, robot, task, seed))
    if axis == "language":
        return PLAIN
    levels, draw = _AXES[axis]
    return draw(levels[level - 1], scene)


def dynamics(name: str, robot: str, task: str, seed: int) -> Variation:
    """Return the variation of one scene with a condition of `DYNAMICS`. Raises BlmError if unknown."""
    condition = lookup("condition of the dynamics", name, DYNAMICS)
    scene = _Scene(robot, task, seed, _generator("dynamics", name, robot, task, seed))
    if name != "moved_goal":
        return Variation(dynamics=condition)
    by = scene.goal_displacement()
    return Variation(dynamics=Dynamics(move_goal_at=condition.move_goal_at, move_goal_by=by))


@cache
def table_hash() -> str:
    """Return a short hash of all levels, and of what is drawn from them for a few scenes."""
    levels = {axis: [asdict(level) for level in levels] for axis, (levels, _) in _AXES.items()}
    drawn = [
        _rounded(perturbation(axis, level, robot, "stack_cube", seed).to_json())
        for axis in AXES
        for level in LEVELS
        for robot in ROBOTS
        for seed in range(2)
    ]
    conditions = [_rounded(dynamics(name, "panda", "stack_cube", 0).to_json()) for name in DYNAMICS]
    text = json.dumps([_DRAWING, levels, drawn, conditions])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class _Scene:
    """The plain scene that is varied, and the random draws of its variation."""

    def __init__(self, robot: str, task: str, seed: int, rng: np.random.Generator) -> None:
        self.seed, self.rng, self.cell = seed, rng, (robot, task)
        self._task = lookup("task", task, TASKS)
        self._draw = draw_scene(robot, task, seed)

    def signed(self, amount: float) -> float:
        """Return the amount with a random sign."""
        return amount if self.rng.random() < 0.5 else -amount

    def direction(self) -> FloatArray:
        """Return a random unit vector [3]."""
        vector = self.rng.normal(size=3)
        return vector / np.linalg.norm(vector)

    def color(self, base: Vector, change: float) -> Vector:
        """Draw a colour near `base` that is unlike those of the task's things, or the most unlike of many."""
        low, high = (np.clip(np.array(base) + end, 0, 1) for end in (-change, change))
        draws = self.rng.uniform(low, high, (_DRAWS, 3))
        contrast = np.linalg.norm(draws[:, None] - self._colors(), axis=-1).min(axis=1)
        chosen = np.argmax(contrast >= _CONTRAST) if contrast.max() >= _CONTRAST else np.argmax(contrast)
        r, g, b = draws[chosen].tolist()
        return r, g, b

    def goal_displacement(self) -> tuple[float, float]:
        """Draw a displacement of the goal on which it does not meet the object, [m]."""
        name, goal = self._task.object, self._task.goal
        placement = self._draw.placement
        apart = np.subtract(placement[goal][0], placement[name][0])[:2] if goal else np.full(2, np.inf)
        while True:
            x, y = self.direction()[:2]
            by = _GOAL_MOVES_BY * np.array([x, y]) / np.hypot(x, y)
            if np.linalg.norm(apart + by) >= min(_GOAL_KEEPS, float(np.linalg.norm(apart))):
                return float(by[0]), float(by[1])

    def _colors(self) -> FloatArray:
        """Return the colours of all things of the task, [N, 3]."""
        return np.array([PALETTE[part.color][:3] for item in self._draw.items for part in item.parts])


def _camera(level: CameraLevel, scene: _Scene) -> Variation:
    x, y, z = (level.position * scene.direction()).tolist()
    shift = CameraShift(
        azimuth=float(np.radians(scene.signed(level.azimuth))),
        offset=(x, y, z),
        field_of_view=1 + scene.signed(level.zoom),
    )
    return Variation(camera=shift)


def _light(level: LightLevel, scene: _Scene) -> Variation:
    turn = float(np.radians(level.direction))
    light = Lighting(
        brightness=level.brightness,
        direction=(scene.signed(turn), scene.signed(turn)),
        warmth=scene.signed(level.warmth),
        shadows=level.shadows,
    )
    return Variation(light=light)


def _background(level: BackgroundLevel, scene: _Scene) -> Variation:
    surfaces = [
        Surface(
            color=scene.color(base, level.change),
            pattern=level.patterns[scene.rng.integers(len(level.patterns))],
            other=scene.color(base, level.change),
            seed=int(scene.rng.integers(2**31)),
        )
        for base in (TABLE_COLOR, WALL_COLOR)
    ]
    return Variation(table=surfaces[0], wall=surfaces[1])


def _layout(level: LayoutLevel, scene: _Scene) -> Variation:
    change = scene.signed(level.change)
    clutter = Clutter(
        distractors=level.distractors,
        similar=bool(scene.seed % 2),
        scale=1 - abs(change) if scene.cell in _ONLY_SMALLER else 1 + change,
        tint=(scene.signed(level.change), scene.signed(level.change), scene.signed(level.change)),
    )
    return Variation(clutter=clutter)


def _start(level: StartLevel, scene: _Scene) -> Variation:
    return Variation(arm_offset=level.offset)


def _sensors(level: SensorLevel, scene: _Scene) -> Variation:
    values = asdict(level) | {"exposure": 1 + scene.signed(level.exposure)}
    return Variation(sensors=SensorNoise(**values))


_AXES: Mapping[str, tuple[tuple[Any, ...], Callable[[Any, _Scene], Variation]]] = {
    "camera": (CAMERA, _camera),
    "light": (LIGHT, _light),
    "background": (BACKGROUND, _background),
    "layout": (LAYOUT, _layout),
    "start": (START, _start),
    "sensors": (SENSORS, _sensors),
}
"""Axis -> its levels, and what varies a scene by one of them."""


def _generator(*key: object) -> np.random.Generator:
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def _rounded(value: Any) -> Any:
    """Round all numbers in JSON, so that the last bit of a machine's arithmetic does not count."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value
