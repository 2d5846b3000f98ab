"""Limits of the arm that no command may exceed, and thresholds of the safety checks.

The user sets both. A policy server also states joint ranges and a control rate; they are compared
with the user's, and never used in their place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from blm.types import ActionSpace, BlmError, ContractError, FloatArray, PolicyContract, lookup, shorten

KIND = "absolute_joint_position"
RANGE_TOLERANCE = 0.01
"""Accepted excess of the server's joint range over ours [rad]: data sheets are rounded."""
RATE_TOLERANCE = 1e-3
"""Accepted relative difference of the control rates."""
MAX_HORIZON, MAX_IMAGE_SIZE = 1000, 4096


class StoppedError(BlmError):
    """The loop stopped the arm, or refused to start it, for the given `reason`.

    `kind` is the reason in one word.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind, self.reason = kind, reason


@dataclass(frozen=True, kw_only=True)
class ArmLimits:
    """Limits of commands in position, velocity and acceleration.

    One value per joint, then the gripper's. Units: rad, rad/s, rad/s^2 for joints; openings (0
    closed, 1 open) and their derivatives for the gripper.
    """

    robot: str
    """Name of the robot in the policy's contract."""
    names: tuple[str, ...]
    """Joint names in the order of the policy's action space; the last is 'gripper'."""
    low: tuple[float, ...]
    high: tuple[float, ...]
    velocity: tuple[float, ...]
    acceleration: tuple[float, ...]
    rate_hz: float = 20.0
    """Commands per second."""

    def __post_init__(self) -> None:
        rows = {name: getattr(self, name) for name in ("low", "high", "velocity", "acceleration")}
        for name, row in rows.items():
            if len(row) != len(self.names):
                raise BlmError(f"limits of '{self.robot}': {len(self.names)} names, {len(row)} of {name}")
            if not all(map(_is_finite, row)):
                raise BlmError(f"limits of '{self.robot}': {name} must be finite numbers, got {row}")
        if len(self.names) < 2 or self.names[-1] != "gripper" or len(set(self.names)) != len(self.names):
            raise BlmError(
                f"limits of '{self.robot}': names must differ and end with 'gripper', got {self.names}"
            )
        for name, low, high, speed, change in zip(self.names, *rows.values(), strict=True):
            if not (low < high and speed > 0 and change > 0):
                raise BlmError(
                    f"limits of '{self.robot}', {name}: need low < high, velocity > 0 and acceleration > 0, "
                    f"got {low}..{high}, {speed} and {change}"
                )
        if not _is_finite(self.rate_hz) or not 1 <= self.rate_hz <= 1000:
            raise BlmError(f"limits of '{self.robot}': rate_hz must be 1..1000, got {self.rate_hz}")

    @property
    def dim(self) -> int:
        return len(self.names)

    @property
    def period(self) -> float:
        """Time between two commands [s]."""
        return 1 / self.rate_hz

    @property
    def stopping_s(self) -> float:
        """Longest time to brake from full speed to rest [s]."""
        return max(v / a for v, a in zip(self.velocity, self.acceleration, strict=True))

    @classmethod
    def of(
        cls,
        space: ActionSpace,
        *,
        velocity: Sequence[float],
        acceleration: Sequence[float],
        gripper_velocity: float = 5.0,
        gripper_acceleration: float = 100.0,
    ) -> ArmLimits:
        """Take names, ranges and rate from an action space.

        Velocities and accelerations are per arm joint. The defaults of the gripper are our choice:
        0.2 s from open to closed, full speed after 0.05 s. Grippers limit their own speed, and a
        policy does not wait for a gripper that limits slow down.
        """
        return cls(
            robot=space.robot,
            names=space.names,
            low=tuple(map(float, space.low)),
            high=tuple(map(float, space.high)),
            velocity=(*map(float, velocity), gripper_velocity),
            acceleration=(*map(float, acceleration), gripper_acceleration),
            rate_hz=space.rate_hz,
        )

    def outside(self, state: FloatArray) -> FloatArray:
        """Return how far each value of a state [D] is outside its range; 0 inside."""
        return np.maximum(0.0, np.maximum(np.array(self.low) - state, state - np.array(self.high)))

    def check_contract(self, contract: PolicyContract, *, accept_wider: bool = False) -> ActionSpace:
        """Return the policy's action space for this robot.

        Raises ContractError that shows both sides. Rates, names and their order must be equal, kind
        and units must be those that the loop executes, and ranges must not be wider than ours
        unless `accept_wider`. Commands are kept inside ours in any case.
        """
        space = lookup("robot", self.robot, contract.action_spaces)
        if space.kind != KIND:
            raise ContractError(
                f"actions of '{self.robot}' are '{_short(space.kind)}'; the loop executes '{KIND}' only"
            )
        units = ("rad",) * (self.dim - 1) + ("opening",)
        for field, theirs, ours in (("names", space.names, self.names), ("units", space.units, units)):
            if tuple(theirs) != ours:
                raise ContractError(f"{field} of '{self.robot}': ours {ours}, the policy's {_short(theirs)}")
        for rate in (space.rate_hz, contract.rate_hz):
            if not _is_finite(rate) or abs(rate - self.rate_hz) > RATE_TOLERANCE * self.rate_hz:
                raise ContractError(f"the robot runs at {self.rate_hz} Hz, the policy at {_short(rate)} Hz")
        if space.state is not None:
            raise ContractError(
                f"the policy's state of '{self.robot}' is {_short(space.state_names)}, and not that of its "
                "actions, which the loop sends; map the same joints as state and action"
            )
        self._check_range(space, accept_wider)
        self._check_sizes(contract)
        return space

    def _check_range(self, space: ActionSpace, accept_wider: bool) -> None:
        for name, low, high, *theirs in zip(
            self.names, self.low, self.high, space.low, space.high, strict=True
        ):
            given = (
                f"{name} of '{self.robot}': the policy's range is {_short(theirs[0])}..{_short(theirs[1])}"
            )
            if not all(map(_is_finite, theirs)) or not theirs[0] < theirs[1]:
                raise ContractError(
                    f"{given}; both limits must be finite, the lower one first (a policy of somebody else's "
                    "dataset has them from 'low' and 'high' of its mapping)"
                )
            if theirs[1] < low or theirs[0] > high:
                raise ContractError(f"{given}, which does not overlap the robot's {low}..{high}")
            wider = theirs[0] < low - RANGE_TOLERANCE or theirs[1] > high + RANGE_TOLERANCE
            if wider and not accept_wider:
                raise ContractError(
                    f"{given}, wider than the robot's {low}..{high}; if you narrowed the robot's range on "
                    "purpose, set Safety(accept_wider_limits=True)"
                )

    @staticmethod
    def _check_sizes(contract: PolicyContract) -> None:
        ranges = {"horizon": MAX_HORIZON, "execute": contract.horizon, "image_size": MAX_IMAGE_SIZE}
        for name, most in ranges.items():
            value = getattr(contract, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ContractError(f"the policy's {name} must be 1..{most}, got {_short(value)}")


@dataclass(frozen=True, kw_only=True)
class Safety:
    """Thresholds for refusing to start, for holding and for stopping. Times in s, angles in rad."""

    start_tolerance: float = 0.05
    """Maximum distance of a joint outside its range at the start; it moves back slowly."""
    gripper_tolerance: float = 0.1
    """Maximum distance of the gripper's measured opening outside its range at the start."""
    still: float = 0.01
    """Maximum motion of a joint during the readings before the start."""
    check_readings: int = 3
    """Number of consecutive valid readings that are required before the start."""
    start_s: float = 5.0
    """Maximum time until these readings have arrived; then the start is refused."""
    observation_hold_s: float = 0.3
    """The arm holds when the last valid observation is older than this."""
    observation_stop_s: float = 1.0
    """The arm stops when it is older than this."""
    frozen_s: float = 0.5
    """The arm stops when a camera's image has not changed for this long while a joint moved by
    `moving`. A blank image (black, or of one colour) counts as a failed observation."""
    moving: float = 0.02
    """Motion of a joint from which the arm counts as moving."""
    following_error: float = 0.25
    """Maximum following error: the distance of a measured joint from the commands of the last
    `following_lag_s`. The arm holds above it, and stops when that lasts `following_s`. The gripper
    is exempt, because an object blocks it."""
    following_lag_s: float = 0.4
    following_s: float = 0.5
    clamp_error: float = 0.1
    """A command that differs from the policy's target by more than this counts as clamped. The arm
    stops when nine of ten commands of the last `clamp_s` were clamped."""
    clamp_s: float = 3.0
    repeat_s: float = 5.0
    """The arm stops when all chunks within this time are bit-equal although the arm has moved."""
    deadline_s: float = 1.0
    """Deadline of a reply after its request; later ones are dropped."""
    bad_replies: int = 3
    """Consecutive malformed replies after which the arm stops."""
    max_hold_s: float = 10.0
    """The arm stops when it has held for this long, for any reason. Until then the link reconnects
    to a lost server."""
    send_stop_s: float = 0.5
    """The arm stops when commands have failed or blocked for this long."""
    stall_s: float = 1.0
    """Watchdog timeout for the loop and for the e-stop hook; then the arm stops."""
    accept_wider_limits: bool = False
    """Accept a policy whose joint ranges are wider than ours, which still limit commands."""
    accept_torque_off: bool = False
    """Accept a LeRobot arm that goes limp when it disconnects (`disable_torque_on_disconnect`)."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, bool):
                continue
            if not isinstance(value, int | float) or not value > 0:
                raise BlmError(f"Safety({item.name}={value!r}): must be a positive number")
        if not (isinstance(self.check_readings, int) and isinstance(self.bad_replies, int)):
            raise BlmError("Safety: check_readings and bad_replies must be whole numbers")
        if self.observation_hold_s > self.observation_stop_s:
            raise BlmError("Safety: observation_hold_s must not be longer than observation_stop_s")


def _is_finite(value: object) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]


def _short(value: object) -> str:
    return shorten(str(value), 120, quote=False)
