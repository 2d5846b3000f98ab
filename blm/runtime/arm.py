"""The robot interface: a LeRobot-style `Robot`, its units and its cameras."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from blm.runtime.limits import ArmLimits
from blm.types import BlmError, ContractError, FloatArray, ImageArray, PolicyContract

BLANK = 8
"""Maximum variation of a channel in an image that counts as blank [grey levels]."""


class RobotLike(Protocol):
    """The required part of `lerobot.robots.Robot`.

    Keys are "<joint>.pos" and the names of the cameras.
    """

    def connect(self) -> Any: ...

    def disconnect(self) -> Any: ...

    def get_observation(self) -> Mapping[str, Any]: ...

    def send_action(self, action: dict[str, Any]) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Units:
    """Scale factors from the robot's values to radians and gripper openings in 0 .. 1."""

    joint: float = 1.0
    """Joint position [rad] = value * joint; np.pi / 180 for a robot that reports degrees."""
    gripper: float = 1.0
    """Opening = value * gripper; 0.01 for a gripper from 0 to 100."""

    def __post_init__(self) -> None:
        if not all(np.isfinite(v) and v > 0 for v in (self.joint, self.gripper)):
            raise BlmError(f"{self}: both must be positive numbers")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One valid observation of the arm."""

    observed_at: float
    """When the call of `get_observation` began, on the loop's monotonic clock [s]."""
    state: FloatArray
    """[D] float64: joints [rad], gripper opening."""
    images: Mapping[str, ImageArray]


class Arm:
    """Converts the robot's observations to SI units, and commands to the robot's units."""

    def __init__(
        self,
        robot: RobotLike,
        limits: ArmLimits,
        *,
        cameras: Mapping[str, str] | None = None,
        units: Units | None = None,
        image_size: int | None = None,
    ) -> None:
        """Map cameras of the contract to keys of the robot's observation.

        `cameras` is None if the names are the same; `fitted` then takes them from the contract.
        `image_size` is the required side of the images [px]; None: the contract fits any size.
        """
        self.robot, self.limits, self.cameras, self.image_size = robot, limits, cameras, image_size
        self.units = units or Units()
        self._scale = np.array([self.units.joint] * (limits.dim - 1) + [self.units.gripper])

    def fitted(self, contract: PolicyContract) -> Arm:
        """Return this arm with the cameras of the policy.

        Raises ContractError if one is missing.
        """
        views = dict(self.cameras or {camera: camera for camera in contract.cameras})
        if missing := sorted(set(contract.cameras) - views.keys()):
            raise ContractError(
                f"the policy needs cameras {', '.join(contract.cameras)}; no camera is given for {missing}"
            )
        views = {camera: views[camera] for camera in contract.cameras}
        side = contract.image_size if contract.picture_fit == "exact" else None
        return Arm(self.robot, self.limits, cameras=views, units=self.units, image_size=side)

    def read(self, now: float) -> Reading:
        """Read an observation from the robot.

        Raises BlmError that names missing or malformed values.
        """
        seen = self.robot.get_observation()
        if not isinstance(seen, Mapping):
            raise BlmError(f"the robot's observation is a {type(seen).__name__}, needed: a map")
        keys, cameras = [f"{name}.pos" for name in self.limits.names], dict(self.cameras or {})
        if missing := [key for key in (*keys, *cameras.values()) if key not in seen]:
            raise BlmError(f"the robot's observation lacks {missing}; it has {sorted(map(str, seen))}")
        state = np.array([_number(seen[key], key) for key in keys]) * self._scale
        images = {camera: self._image(seen[key], key) for camera, key in cameras.items()}
        return Reading(observed_at=now, state=state, images=images)

    def send(self, command: FloatArray) -> None:
        """Send one command [D].

        Raises BlmError, and sends nothing, unless every value is finite.
        """
        if command.shape != (self.limits.dim,) or not np.isfinite(command).all():
            raise BlmError(f"refused to send {command}: needed {self.limits.dim} finite numbers")
        values = (command / self._scale).tolist()
        names = self.limits.names
        self.robot.send_action({f"{name}.pos": value for name, value in zip(names, values, strict=True)})

    def _image(self, value: Any, key: str) -> ImageArray:
        image = np.array(value)  # a copy: some drivers write the next frame into the same buffer
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise BlmError(f"camera '{key}': {image.dtype} {image.shape}; needed: uint8 [height, width, 3]")
        if self.image_size is not None and image.shape[:2] != (self.image_size, self.image_size):
            raise BlmError(
                f"camera '{key}': {image.shape}; the policy needs {self.image_size}x{self.image_size}: "
                "crop and resize in the robot's get_observation"
            )
        if np.ptp(image, (0, 1)).max() <= BLANK:
            raise BlmError(f"camera '{key}' gives a blank image, value {image[0, 0].tolist()} everywhere")
        return image


def _number(value: Any, key: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise BlmError(f"the robot's '{key}' is not a number: {error}") from error
    if not np.isfinite(number):
        raise BlmError(f"the robot's '{key}' is {number}")
    return number
