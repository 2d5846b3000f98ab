"""Minimal levels, against which the protocols were developed; the real ones replace this file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from blm.tasks.variation import (
    PLAIN,
    CameraShift,
    Clutter,
    Dynamics,
    Lighting,
    SensorNoise,
    Surface,
    Variation,
)
from blm.types import lookup

AXES: tuple[str, ...] = ("camera", "light", "background", "layout", "start", "sensors", "language")
LEVELS = (1, 2, 3, 4, 5)
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
    "moved_goal": Dynamics(move_goal_at=40, move_goal_by=(0.03, 0.03)),
}
_STEPS = (0.1, 0.2, 0.3, 0.4, 0.5)


def perturbation(axis: str, level: int, robot: str, task: str, seed: int) -> Variation:
    """Return the variation of one episode on a graded axis."""
    step = _STEPS[level - 1]
    found = {
        "camera": Variation(camera=CameraShift(azimuth=step / 2)),
        "light": Variation(light=Lighting(brightness=1 - step)),
        "background": Variation(table=Surface(color=(step, step, step))),
        "layout": Variation(clutter=Clutter(distractors=2 * level)),
        "start": Variation(arm_offset=step),
        "sensors": Variation(sensors=SensorNoise(joints=step / 20)),
        "language": PLAIN,
    }
    return lookup("axis", axis, found)


def dynamics(name: str, robot: str, task: str, seed: int) -> Variation:
    """Return the variation of one episode of the dynamics table."""
    return Variation(dynamics=lookup("dynamics condition", name, DYNAMICS))


def table_hash() -> str:
    """Return the hash of all level data."""
    levels = [perturbation(a, n, "", "", 0).to_json() for a in AXES for n in LEVELS]
    text = json.dumps([levels, {name: repr(value) for name, value in DYNAMICS.items()}])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
