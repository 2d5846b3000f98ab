"""Drive a real arm from a served policy: read, ask ahead of time, clamp, send, and stop when in doubt.

The arm is any object with the methods of LeRobot's `Robot`. The loop never waits for the model: while a chunk
is computed the one before it goes on, and the new one is told to continue it (real-time chunking).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from blm.types import ActionSpace, BlmError, FloatArray, ImageArray, LateError, Observation, Policy


class RobotLike(Protocol):
    """The part of `lerobot.robots.Robot` that is needed: keys are "<joint>.pos" and the names of cameras."""

    def connect(self) -> None: ...

    def disconnect(self) -> None: ...

    def get_observation(self) -> Mapping[str, Any]: ...

    def send_action(self, action: dict[str, Any]) -> Any: ...


class StoppedError(BlmError):
    """The arm was stopped; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Safety:
    """When to clamp, when to hold still, when to stop for good."""

    speed: float = 1.0
    """Greatest speed of a joint's target [rad/s]."""
    gripper_speed: float = 2.5
    """Greatest speed of the gripper's target [openings/s]."""
    stale_s: float = 0.5
    """Without a new observation for this long, or with pictures that do not change for this long while the
    arm moves, the arm is stopped."""
    moving: float = 0.02
    """How far a joint must have moved [rad] for frozen pictures to be a fault."""
    patience_s: float = 10.0
    """After a lost connection the arm holds still, and the server is tried again for this long."""

    def __post_init__(self) -> None:
        if min(self.speed, self.gripper_speed, self.stale_s, self.moving) <= 0 or self.patience_s < 0:
            raise BlmError(f"{self}: speeds and times must be positive")


@dataclass
class Report:
    """What happened in a run."""

    steps: int = 0
    chunks: int = 0
    held: int = 0
    """Steps without an action to carry out: the arm kept its last target."""
    clamped: int = 0
    """Actions that were too far or too fast."""
    unread: int = 0
    """Observations that failed, one at a time."""
    late: int = 0
    """Chunks that came after their deadline."""
    reconnections: int = 0
    latencies_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Units:
    """How the arm's own numbers relate to ours: joint in rad = number * joint, opening 0 .. 1 likewise."""

    joint: float = 1.0
    """np.pi / 180 for an arm that speaks degrees."""
    gripper: float = 1.0
    """0.01 for a gripper from 0 to 100."""


class Arm:
    """A LeRobot-style arm as one of our robots."""

    def __init__(
        self, robot: RobotLike, space: ActionSpace, cameras: Mapping[str, str], units: Units
    ) -> None:
        """`cameras`: camera of the contract -> key of the arm's observation."""
        self.robot, self.space, self.cameras = robot, space, cameras
        self.scale = np.array([units.joint] * (space.dim - 1) + [units.gripper])

    def read(self) -> tuple[FloatArray, dict[str, ImageArray]]:
        """Return state [D] and pictures. Raises BlmError naming a key that is missing or not a number."""
        seen = self.robot.get_observation()
        keys = [f"{name}.pos" for name in self.space.names]
        if missing := [key for key in (*keys, *self.cameras.values()) if key not in seen]:
            raise BlmError(f"the robot's observation lacks {missing}; it has {sorted(seen)}")
        state = np.array([float(seen[key]) for key in keys]) * self.scale
        images = {camera: np.asarray(seen[key], np.uint8) for camera, key in self.cameras.items()}
        return self.space.check_state(state, "the robot"), images

    def send(self, target: FloatArray) -> None:
        values = (np.asarray(target, np.float64) / self.scale).tolist()
        self.robot.send_action({f"{name}.pos": v for name, v in zip(self.space.names, values, strict=True)})


def clamp(target: FloatArray, last: FloatArray, space: ActionSpace, safety: Safety) -> FloatArray:
    """Return the target within the joints' limits, and no farther from the last one than a step allows."""
    most = np.array([safety.speed] * (space.dim - 1) + [safety.gripper_speed]) / space.rate_hz
    near = np.clip(target, last - most, last + most)
    return np.clip(near, space.low, space.high).astype(np.float32)


class Watch:
    """Tells when observations are stale."""

    def __init__(self, safety: Safety, clock: Callable[[], float]) -> None:
        self.safety, self.clock = safety, clock
        self.read_at = self.changed_at = clock()
        self.pictures: dict[str, bytes] = {}
        self.state: FloatArray | None = None

    def seen(self, state: FloatArray, images: Mapping[str, ImageArray]) -> None:
        """Note a good observation. Raises StoppedError for pictures that stand still while the arm moves."""
        now, pictures = self.clock(), {camera: image.tobytes() for camera, image in images.items()}
        self.read_at = now
        frozen = [camera for camera, data in pictures.items() if data == self.pictures.get(camera)]
        if self.state is None or not frozen:
            self.pictures, self.state, self.changed_at = pictures, state, now
        elif (
            now - self.changed_at > self.safety.stale_s
            and np.abs(state - self.state).max() > self.safety.moving
        ):
            raise StoppedError(f"cameras {frozen} have shown one picture for {now - self.changed_at:.2f} s")

    def missed(self, error: Exception) -> None:
        """Note a failed one. Raises StoppedError when there has been none for too long."""
        if (since := self.clock() - self.read_at) > self.safety.stale_s:
            raise StoppedError(f"no observation for {since:.2f} s: {error!r}") from error


class Driver:
    """The control loop of one run; `make_policy` connects to the server, again after a lost connection."""

    def __init__(
        self,
        robot: RobotLike,
        make_policy: Callable[[], Policy],
        name: str,
        instruction: str,
        *,
        cameras: Mapping[str, str] | None = None,
        units: Units | None = None,
        safety: Safety | None = None,
    ) -> None:
        """`name`: which robot of the policy's contract this is. Raises BlmError for one that it lacks."""
        self.make_policy, self.safety, self.instruction = make_policy, safety or Safety(), instruction
        self.policy = make_policy()
        contract = self.policy.contract
        if name not in contract.action_spaces:
            raise BlmError(f"the policy drives {', '.join(contract.action_spaces)}, not '{name}'")
        self.space = contract.action_spaces[name]
        views = dict(cameras or {camera: camera for camera in contract.cameras})
        if missing := set(contract.cameras) - views.keys():
            raise BlmError(f"the policy sees {', '.join(contract.cameras)}; no camera is given for {missing}")
        self.arm = Arm(robot, self.space, views, units or Units())
        self.report = Report()
        self._pool = ThreadPoolExecutor(1, "blm-driver")

    def run(self, seconds: float) -> Report:
        """Drive for so long. Raises StoppedError after the arm has been told to hold where it is."""
        self.arm.robot.connect()
        try:
            self._loop(seconds)
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self.arm.robot.disconnect()
        return self.report

    def _loop(self, seconds: float) -> None:
        period, watch = 1 / self.space.rate_hz, Watch(self.safety, time.monotonic)
        state, images = self._first_look()
        last, plan, begun = state, state[None], 0
        asked: tuple[int, Future[FloatArray]] | None = None
        try:
            for step in range(round(seconds / period)):
                due = time.monotonic() + period
                try:
                    state, images = self.arm.read()
                    watch.seen(state, images)
                except (OSError, TimeoutError, ConnectionError) as error:
                    self.report.unread += 1
                    watch.missed(error)
                if asked is not None and asked[1].done():
                    arrived = self._arrived(asked[1], last)
                    if arrived is not None:
                        plan, begun = arrived, asked[0]
                    asked = None
                due_again = step == 0 or step - begun >= self.policy.contract.execute - self._lead()
                if asked is None and due_again:
                    asked = step, self._ask(state, images, plan[step - begun :], step)
                last = self._send(plan, step - begun, last)
                time.sleep(max(0.0, due - time.monotonic()))
        except BaseException:
            self.arm.send(state)  # hold where it is
            raise

    def _first_look(self) -> tuple[FloatArray, dict[str, ImageArray]]:
        try:
            return self.arm.read()
        except (OSError, TimeoutError) as error:
            raise StoppedError(f"the robot gives no observation: {error!r}") from error

    def _ask(
        self, state: FloatArray, images: Mapping[str, ImageArray], left: FloatArray, step: int
    ) -> Future[FloatArray]:
        """Ask for the chunk that begins at this step, in the other thread."""
        observation = Observation(
            images=images,
            state=state,
            instruction=self.instruction,
            robot=self.space.robot,
            seed=step,
            chunk=left if step and len(left) else None,
            frozen=min(self._lead(), len(left)) if step else 0,
        )

        def ask() -> FloatArray:
            begin = time.monotonic()
            actions = self.policy.act(observation).actions
            self.report.latencies_ms.append(1000 * (time.monotonic() - begin))
            return actions

        return self._pool.submit(ask)

    def _lead(self) -> int:
        """How many steps an answer is expected to take: as many as the last one."""
        last_s = self.report.latencies_ms[-1] / 1000 if self.report.latencies_ms else 0.0
        most = max(1, self.policy.contract.execute - 1)
        return min(max(1, math.ceil(last_s * self.space.rate_hz)), most)

    def _arrived(self, answer: Future[FloatArray], last: FloatArray) -> FloatArray | None:
        """Return the new chunk; None if it is late, or the server was lost and found again."""
        try:
            chunk = answer.result()
        except LateError:
            self.report.late += 1
            return None
        except BlmError as error:
            self._reconnect(error, last)
            return None
        self.report.chunks += 1
        return chunk

    def _reconnect(self, lost: BlmError, last: FloatArray) -> None:
        """Hold still and try the server again. Raises StoppedError when patience is over."""
        end = time.monotonic() + self.safety.patience_s
        while time.monotonic() < end:
            self.arm.send(last)
            try:
                policy = self.make_policy()
            except BlmError:
                time.sleep(0.2)
                continue
            if policy.contract != self.policy.contract:
                raise StoppedError("the server that came back serves another policy") from lost
            self.policy, self.report.reconnections = policy, self.report.reconnections + 1
            return
        raise StoppedError(f"the policy server is lost: {lost}") from lost

    def _send(self, plan: FloatArray, place: int, last: FloatArray) -> FloatArray:
        if place >= len(plan):
            self.report.held += 1
        wanted = plan[min(place, len(plan) - 1)]
        target = clamp(wanted, last, self.space, self.safety)
        self.report.clamped += bool(np.abs(target - wanted).max() > 1e-6)
        self.report.steps += 1
        self.arm.send(target)
        return target
