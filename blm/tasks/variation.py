"""How an episode differs from the plain suite, as data: looks, layout, sensors, dynamics.

A `Variation` states final values, not distributions: `blm.tasks.randomization` draws them for training,
and `blm.tasks.suite_plus` fixes them for evaluation. World frame: x forward from the robot, y left, z up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, get_args

from blm.types import BlmError

Vector = tuple[float, float, float]
Pattern = Literal["", "checker", "stripes", "wood", "noise", "marble", "dots"]
"""Procedural texture of a surface; empty for a plain colour."""


@dataclass(frozen=True, kw_only=True)
class CameraShift:
    """A shift of all third-person cameras together."""

    azimuth: float = 0.0
    """Rotation about the vertical axis through the workspace's centre [rad]."""
    offset: Vector = (0.0, 0.0, 0.0)
    """Translation in the world frame [m]."""
    field_of_view: float = 1.0
    """Factor of the vertical field of view."""


@dataclass(frozen=True, kw_only=True)
class Lighting:
    """Brightness, direction and colour of all light in the scene."""

    brightness: float = 1.0
    """Factor of all lights."""
    direction: tuple[float, float] = (0.0, 0.0)
    """Rotation of the directional light about the world's x and y axes [rad]."""
    warmth: float = 0.0
    """Colour temperature: -1 bluish .. 0 neutral .. 1 reddish."""
    shadows: bool = False
    """Whether objects cast shadows."""


@dataclass(frozen=True, kw_only=True)
class Surface:
    """The look of the table or of the wall behind it."""

    color: Vector | None = None
    """Colour [0..1]; None for that of the plain suite."""
    pattern: Pattern = ""
    other: Vector = (1.0, 1.0, 1.0)
    """Second colour of the pattern [0..1]."""
    seed: int = 0
    """Seed of the pattern's phase, scale and grain."""


@dataclass(frozen=True, kw_only=True)
class Clutter:
    """Solid objects that the task does not need, and changed task objects."""

    distractors: int = 0
    """Number of distractors that collide with everything."""
    similar: bool = False
    """Whether distractors share the kind or the colour of a task object."""
    scale: float = 1.0
    """Factor of the size of the task's objects."""
    tint: Vector = (0.0, 0.0, 0.0)
    """Change of the colour channels of the task's objects [0..1]."""


@dataclass(frozen=True, kw_only=True)
class SensorNoise:
    """Errors of cameras and joint encoders, drawn anew at every observation."""

    blur: float = 0.0
    """Standard deviation of a Gaussian blur [px of 112]."""
    pixel_noise: float = 0.0
    """Standard deviation of Gaussian pixel noise [0..255]."""
    jpeg_quality: int = 0
    """Quality of JPEG compression, 1..100; 0 for none."""
    exposure: float = 1.0
    """Factor of the pixel values before clipping."""
    dropped: float = 0.0
    """Probability that a camera delivers its previous picture again."""
    joints: float = 0.0
    """Standard deviation of the noise of measured joint positions [rad]."""


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """Changed physics and control."""

    mass: float = 1.0
    """Factor of the mass of the task's free objects."""
    friction: float = 1.0
    """Factor of all sliding friction, finger pads included."""
    grip_force: float = 1.0
    """Factor of the gripper's force."""
    delay: int = 0
    """Number of control steps between an observation and the arrival of its chunk."""
    hold: int = 1
    """Number of control steps for which an action is held: 2 is control at half the rate."""
    move_goal_at: int = -1
    """Control step at which the goal (or the object, if there is no goal) is moved; -1 for never."""
    move_goal_by: tuple[float, float] = (0.0, 0.0)
    """Displacement of that goal along x and y [m]."""


@dataclass(frozen=True, kw_only=True)
class Variation:
    """All differences of one episode from the plain suite; by default none."""

    camera: CameraShift = field(default_factory=CameraShift)
    light: Lighting = field(default_factory=Lighting)
    table: Surface = field(default_factory=Surface)
    wall: Surface = field(default_factory=Surface)
    robot_tint: Vector = (0.0, 0.0, 0.0)
    """Change of the colour channels of the robot [0..1]."""
    clutter: Clutter = field(default_factory=Clutter)
    arm_offset: float = 0.0
    """Norm of a random offset of the initial joint positions [rad]."""
    sensors: SensorNoise = field(default_factory=SensorNoise)
    dynamics: Dynamics = field(default_factory=Dynamics)

    def __post_init__(self) -> None:
        for surface in (self.table, self.wall):
            if surface.pattern not in get_args(Pattern):
                raise BlmError(f"pattern {surface.pattern!r} must be one of {get_args(Pattern)}")
        for what, value, low, high in (
            ("field of view", self.camera.field_of_view, 0.5, 2.0),
            ("brightness", self.light.brightness, 0.0, 4.0),
            ("scale of objects", self.clutter.scale, 0.5, 1.5),
            ("number of solid distractors", self.clutter.distractors, 0, 20),
            ("arm offset", self.arm_offset, 0.0, 1.0),
            ("probability of dropped pictures", self.sensors.dropped, 0.0, 1.0),
            ("JPEG quality", self.sensors.jpeg_quality, 0, 100),
            ("delay", self.dynamics.delay, 0, 100),
            ("hold", self.dynamics.hold, 1, 10),
        ):
            if not low <= value <= high:
                raise BlmError(f"the {what} of a variation is {value}; it must be {low} to {high}")

    def to_json(self) -> dict[str, Any]:
        """Return the parts that differ from the plain suite."""
        whole = asdict(self)
        return {key: whole[key] for key in whole if getattr(self, key) != getattr(PLAIN, key)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read `to_json`. Raises BlmError for an unknown part and TypeError for an unknown field."""
        kinds = {f.name: type(getattr(PLAIN, f.name)) for f in fields(cls)}
        if unknown := {*value} - {*kinds}:
            raise BlmError(f"a variation has no {sorted(unknown)}; valid: {sorted(kinds)}")
        read: dict[str, Any] = {}
        for name, part in value.items():
            if isinstance(part, Mapping):
                values = {key: tuple(v) if isinstance(v, list) else v for key, v in part.items()}
                read[name] = kinds[name](**values)
            else:
                read[name] = tuple(part) if isinstance(part, list) else part
        return cls(**read)


PLAIN = Variation()
"""The plain suite."""
