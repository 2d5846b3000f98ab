"""Domain randomisation: the distribution of scenes' variations in training data.

The ranges reach as far as the hardest level of `blm.tasks.suite_plus`, except that two patterns of
table and wall are never drawn, so that the evaluation also shows surfaces that no training has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from blm.tasks.scene import TABLE_COLOR, WALL_COLOR
from blm.tasks.variation import (
    PLAIN,
    CameraShift,
    Clutter,
    Lighting,
    Pattern,
    SensorNoise,
    Surface,
    Variation,
    Vector,
)
from blm.types import require_numbers

TRAINING_PATTERNS: tuple[Pattern, ...] = ("checker", "stripes", "wood", "noise")
TEST_PATTERNS: tuple[Pattern, ...] = ("marble", "dots")
"""Patterns that only evaluations show."""


@dataclass(frozen=True, kw_only=True)
class DomainRandomization:
    """How strongly the scenes of training data vary, and in which respects; by default not at all."""

    amplitude: float = 0.0
    """Strength of all variation, 0..1; 0 turns it off.
    With 1, it reaches the hardest level of suite24-plus."""
    plain: float = 0.3
    """Fraction of episodes that stay as in the plain suite, 0..1."""
    looks: bool = True
    """Vary light, table, wall, and the robot's colour."""
    cameras: bool = True
    """Move, turn and zoom the third-person cameras."""
    layout: bool = True
    """Add up to four solid distractors, and vary size and colour of the task's objects."""
    sensors: bool = True
    """Blur, noise, compression, exposure and drops of pictures, and noise of joint readings."""
    start: bool = True
    """Offset the joint positions at the start."""
    wordings: bool = False
    """Draw the instructions of all episodes from the 60 to 100 training wordings of a task.
    Otherwise one of its four phrasings is drawn."""

    def __post_init__(self) -> None:
        require_numbers(self, amplitude=(0, 1), plain=(0, 1))

    def draw(self, rng: np.random.Generator) -> Variation:
        """Draw the variation of an episode. Each part has its own stream, so parts do not affect others."""
        if self.amplitude == 0 or rng.random() < self.plain:
            return PLAIN
        parts: dict[str, Any] = {}
        switches = (self.looks, self.cameras, self.layout, self.sensors, self.start)
        for stream, draw, on in zip(rng.spawn(len(_PARTS)), _PARTS, switches, strict=True):
            if on:
                parts |= draw(stream, self.amplitude)
        return Variation(**parts)


NO_RANDOMIZATION = DomainRandomization()


def _looks(rng: np.random.Generator, size: float) -> dict[str, Any]:
    light = Lighting(
        brightness=_factor(rng, size, 0.4, 1.6),
        direction=(_change(rng, 0.7 * size), _change(rng, 0.7 * size)),
        warmth=_change(rng, size),
        shadows=bool(rng.random() < 0.25),
    )
    return {
        "light": light,
        "table": _surface(rng, size, TABLE_COLOR),
        "wall": _surface(rng, size, WALL_COLOR),
        "robot_tint": _vector(rng, 0.3 * size),
    }


def _surface(rng: np.random.Generator, size: float, color: Vector) -> Surface:
    """Draw a surface: a quarter as in the plain suite, a third tinted, the others patterned."""
    kind = rng.random()
    if kind < 0.25:
        return Surface()
    if kind < 0.6:
        return Surface(color=_mixed(rng, 0.5 * size, color))
    return Surface(
        color=_mixed(rng, size, color),
        pattern=TRAINING_PATTERNS[rng.integers(len(TRAINING_PATTERNS))],
        other=_mixed(rng, size, color),
        seed=int(rng.integers(2**31)),
    )


def _cameras(rng: np.random.Generator, size: float) -> dict[str, Any]:
    shift = CameraShift(
        azimuth=_change(rng, 0.4 * size),
        offset=_vector(rng, 0.07 * size),
        field_of_view=_factor(rng, size, 0.89, 1.12),
    )
    return {"camera": shift}


def _layout(rng: np.random.Generator, size: float) -> dict[str, Any]:
    clutter = Clutter(
        distractors=round(size * rng.choice((0, 0, 1, 2, 3, 4))),
        similar=bool(rng.random() < 0.5),
        scale=1 + _change(rng, 0.2 * size),
        tint=_vector(rng, 0.2 * size),
    )
    return {"clutter": clutter}


def _sensors(rng: np.random.Generator, size: float) -> dict[str, Any]:
    """Draw sensor errors; each occurs in two of five episodes."""
    blur, noise, jpeg, exposure, dropped, joints = rng.random(6) < 0.4
    sensors = SensorNoise(
        blur=float(blur * rng.uniform(0, 1.4 * size)),
        pixel_noise=float(noise * rng.uniform(0, 28 * size)),
        jpeg_quality=int(jpeg) * round(100 - size * rng.uniform(10, 85)),
        exposure=_factor(rng, size * exposure, 0.6, 1.5),
        dropped=float(dropped * rng.uniform(0, 0.25 * size)),
        joints=float(joints * rng.uniform(0, 0.03 * size)),
    )
    return {"sensors": sensors}


def _start(rng: np.random.Generator, size: float) -> dict[str, Any]:
    return {"arm_offset": float(rng.uniform(0, 0.5 * size)) if rng.random() < 0.5 else 0.0}


_PARTS: tuple[Callable[[np.random.Generator, float], dict[str, Any]], ...] = (
    _looks,
    _cameras,
    _layout,
    _sensors,
    _start,
)


def _change(rng: np.random.Generator, most: float) -> float:
    return float(most * rng.uniform(-1, 1))


def _vector(rng: np.random.Generator, most: float) -> Vector:
    return _change(rng, most), _change(rng, most), _change(rng, most)


def _factor(rng: np.random.Generator, size: float, low: float, high: float) -> float:
    """Draw a factor from low..high with a uniform logarithm; `size` 0 gives 1."""
    return float(np.exp(size * rng.uniform(np.log(low), np.log(high))))


def _mixed(rng: np.random.Generator, share: float, color: Vector) -> Vector:
    """Mix a colour with a random one."""
    r, g, b = ((1 - share) * channel + share * float(rng.random()) for channel in color)
    return r, g, b
