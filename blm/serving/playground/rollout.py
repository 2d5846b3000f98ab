"""A rollout: one simulated robot in a separate thread, controlled over OpenPI."""

from __future__ import annotations

import base64
import io
import logging
import queue
import reprlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import Image as Pillow

from blm.chunks import ChunkExecutor
from blm.robots import ROBOTS
from blm.serving.client import RemotePolicy
from blm.serving.playground.suggestions import suggested_questions
from blm.tasks import TASKS, Env
from blm.tasks.eef_env import control_of, env_class
from blm.types import BlmError, ImageArray, Observation, PolicyContract, decision_seed, lookup

log = logging.getLogger(__name__)
LARGE, SMALL = 400, 240
"""Sides of the images on the page [px]: of the first camera, and of the others."""
MAX_STEPS = 200
SETTLE_STEPS = 10
"""Number of steps after the task is solved, to show whether it stays solved."""
MAX_SHIFT = 0.3
"""Maximum shift of an object by one command [m]."""
TABLE_HALF = 0.5
"""Maximum distance of an object from the workspace's centre along x and y [m].

No camera shows it further out.
"""
LIGHT = (0.2, 1.5)
"""Range of the brightness that a command may set, as a factor of that of the plain suite."""
MAX_INSTRUCTION = 300
MAX_WAITING_COMMANDS = 16
POLICY_TIMEOUT_S = 30.0
"""Timeout of a connection to a model and of each of its replies [s]."""
CHAT_CAMERAS, CHAT_IMAGE_SIZE = ("base", "side", "wrist"), 112
"""Cameras and image size for a model without a policy, which has no contract."""

RolloutState = Literal["ready", "connecting", "driving", "paused", "solved", "unsolved", "stopped", "error"]
DRIVING: tuple[RolloutState, ...] = ("connecting", "driving")


@dataclass(frozen=True, kw_only=True)
class SceneRequest:
    """The scene that a visitor has chosen."""

    robot: str
    task: str
    seed: int
    instruction: str = ""
    """Replaces the task's instruction unless empty."""

    @classmethod
    def read(cls, command: Mapping[str, Any]) -> SceneRequest:
        """Parse a command. Raises BlmError that names the invalid field."""
        robot, task = (str(command.get(key))[:80] for key in ("robot", "task"))
        lookup("robot", robot, ROBOTS)
        lookup("task", task, TASKS)
        seed, instruction = command.get("seed"), command.get("instruction") or ""
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise BlmError(f"the seed is {reprlib.repr(seed)}; it must be an integer from 0 to 2147483647")
        if not isinstance(instruction, str) or len(instruction) > MAX_INSTRUCTION:
            raise BlmError(f"an instruction is a text of at most {MAX_INSTRUCTION} characters")
        return cls(robot=robot, task=task, seed=seed, instruction=instruction.strip())


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A served model, and how to connect to it."""

    uri: str | None
    """ws:// address.

    None for a server without a policy, whose scenes can be viewed but not controlled.
    """
    contract: PolicyContract | None = None
    """Contract of the policy; None if the server sends it on connection."""
    api_key: str | None = None

    def connect(self) -> RemotePolicy:
        """Connect to the policy. Raises BlmError if there is none, or the connection fails."""
        if self.uri is None:
            raise BlmError(
                "this server has no policy: its model answers questions and cannot control a robot"
            )
        return RemotePolicy(self.uri, api_key=self.api_key, timeout_s=POLICY_TIMEOUT_S)

    def find_contract(self) -> PolicyContract | None:
        if self.contract is None and self.uri is not None:
            with closing(self.connect()) as policy:
                return policy.contract
        return self.contract


@dataclass
class RolloutProgress:
    """How far a run has come; part of each frame that the page shows."""

    step: int = 0
    """Control steps that were executed."""
    latency_ms: int | None = None
    """Duration of the last decision [ms]."""
    solved_at: int | None = None
    """First step after which the task's rule held."""
    holds: bool | None = None
    """Whether the rule still held at the end; None during a run, and for a task that was not
    solved."""


class Rollout(threading.Thread):
    """A scene that can be viewed, driven, paused and disturbed until it is closed.

    The thread owns the simulator and its OpenGL context: both are created and freed in it.
    """

    notify: Callable[[dict[str, Any]], None]
    """Called in this thread with messages for the visitor, {"type": ..}.

    Set it before `start`. The last message is {"type": "closed"}.
    """

    def __init__(self, scene: SceneRequest, model: ServedModel, *, drive: bool) -> None:
        super().__init__(name="blm-playground", daemon=True)
        self.scene, self.model = scene, model
        self.state: RolloutState = "connecting" if drive else "ready"
        self._commands: queue.Queue[Mapping[str, Any]] = queue.Queue(MAX_WAITING_COMMANDS)
        self._closing = threading.Event()
        self._policy: RemotePolicy | None = None
        self._questions: list[str] | None = None
        self._progress = RolloutProgress()

    # --- called from other threads ---

    def send(self, command: Mapping[str, Any]) -> None:
        """Queue a command. Raises BlmError if the queue is full."""
        try:
            self._commands.put_nowait(command)
        except queue.Full:
            raise BlmError(f"{MAX_WAITING_COMMANDS} commands are waiting; try again in a moment") from None

    def request_close(self) -> None:
        """Ask the thread to end; it may still wait for a reply."""
        self._closing.set()
        with suppress(queue.Full):
            self._commands.put_nowait({"type": "wake"})

    # --- in the thread ---

    def run(self) -> None:
        try:
            self._simulate()
        except BlmError as error:
            self._fail(str(error))
        except Exception as error:
            log.exception("a playground scene failed")
            self._fail(f"the simulation failed: {reprlib.repr(error)}")
        finally:
            self.notify({"type": "closed"})

    def _fail(self, message: str) -> None:
        self.state = "error"
        if not self._closing.is_set():
            self.notify({"type": "error", "message": message, "state": "error"})

    def _simulate(self) -> None:
        contract = self.model.find_contract()
        if contract is not None:
            lookup("robot of this model", self.scene.robot, contract.action_spaces)
        cameras = contract.cameras if contract else CHAT_CAMERAS
        size = contract.image_size if contract else CHAT_IMAGE_SIZE
        space = (
            contract.action_spaces[self.scene.robot] if contract else ROBOTS[self.scene.robot].action_space
        )
        env = env_class(control_of(self.scene.robot, space, "the model"))(
            self.scene.robot, self.scene.task, cameras=cameras, image_size=size, terminate_on_success=False
        )
        with closing(env), ExitStack() as opened:
            opened.callback(self._disconnect)
            env.reset(seed=self.scene.seed)
            env.task_description = self.scene.instruction or env.task_description
            self.notify(describe(env))
            self._suggest(env)
            self._show(env)
            steps: Iterator[float] | None = None
            while not self._closing.is_set():
                if self.state in DRIVING:
                    steps = steps or self._drive(env)
                    self._closing.wait(self._advance(env, steps))
                else:
                    steps = steps if self.state == "paused" else None
                self._handle_commands(env, block=self.state not in DRIVING)

    def _advance(self, env: Env, steps: Iterator[float]) -> float:
        """Execute one step; return the time until the next one [s]."""
        begin = time.monotonic()
        try:
            period_s = next(steps)
        except Exception as error:  # of the model or the connection to it: the scene can still be viewed
            message = str(error)
            if not isinstance(error, BlmError):
                log.exception("a playground run failed")
                message = f"the run failed: {reprlib.repr(error)}"
            self._fail(message)
            period_s = 0.0
        self._show(env)
        if self.state not in DRIVING:
            self._disconnect()
        return max(0.0, period_s - (time.monotonic() - begin))

    def _drive(self, env: Env) -> Iterator[float]:
        """Execute control steps while the simulation waits for the model.

        Yields the control period [s].
        """
        self._show(env)
        policy = self._policy = self.model.connect()
        contract = policy.contract
        period_s = 1 / float(np.clip(contract.rate_hz, 1, 100))
        self.state = "driving"
        executor = ChunkExecutor(contract.execute, hold=env.resting_action())
        while True:
            if executor.decision_due:
                observation = observe(env, contract, decision_seed(self.scene.seed, self._progress.step))
                begin = time.monotonic()
                executor.receive(policy.act(observation).actions)
                self._progress.latency_ms = round(1000 * (time.monotonic() - begin))
            self._count_step(bool(env.step(executor.next_action())[4]["success"]))
            yield period_s

    def _count_step(self, success: bool) -> None:
        progress = self._progress
        progress.step += 1
        if success and progress.solved_at is None:
            progress.solved_at = progress.step
        solved_at = progress.solved_at
        if solved_at is not None and progress.step >= min(solved_at + SETTLE_STEPS, MAX_STEPS):
            self.state = "solved"
            progress.holds = success
        elif progress.step >= MAX_STEPS:
            self.state = "unsolved"

    def _handle_commands(self, env: Env, *, block: bool) -> None:
        """Handle all queued commands; with `block`, wait for the first one."""
        with suppress(queue.Empty):
            command = self._commands.get(block=block)
            while not self._closing.is_set():
                try:
                    self._handle_command(env, command)
                except BlmError as error:
                    self.notify({"type": "error", "message": str(error)})
                command = self._commands.get_nowait()

    def _handle_command(self, env: Env, command: Mapping[str, Any]) -> None:
        kind = command["type"]
        if kind == "drive" and self.state == "ready":
            self.state = "connecting"
        elif kind == "pause" and self.state in (*DRIVING, "paused"):
            self.state = "paused" if command.get("on", True) else "driving"
            self._show(env)
        elif kind == "stop" and self.state in (*DRIVING, "paused"):
            self.state = "stopped"
            self._disconnect()
            self._show(env)
        elif kind == "look":
            cameras = {camera: data_uri(env.picture(camera), "PNG") for camera in env.cameras}
            number = command.get("id")
            request_id = number if isinstance(number, int) and abs(number) < 2**53 else None
            step = self._progress.step
            self.notify({"type": "look", "id": request_id, "images": cameras, "step": step})
        elif kind in ("move", "light"):
            (move_object if kind == "move" else set_light)(env, command)
            self._show(env)

    def _disconnect(self) -> None:
        if self._policy is not None:
            self._policy.close()
            self._policy = None

    def _show(self, env: Env) -> None:
        images = {
            camera: data_uri(env.picture(camera, SMALL if index else LARGE), "JPEG")
            for index, camera in enumerate(env.cameras)
        }
        self.notify({"type": "frame", "images": images, "state": self.state, **asdict(self._progress)})
        if self.state not in DRIVING:  # during a run the suggestions must not move under the pointer
            self._suggest(env)

    def _suggest(self, env: Env) -> None:
        questions = suggested_questions(env)
        if questions != self._questions:
            self._questions = questions
            self.notify({"type": "questions", "questions": questions})


def describe(env: Env) -> dict[str, Any]:
    """Return the message that describes a scene: instruction, cameras, movable objects."""
    things = env.objects()
    looks = {name: f"{thing.color} {thing.kind}" for name, thing in things.items()}
    alike = {look for look, count in Counter(looks.values()).items() if count > 1}
    objects = {name: things[name].label if look in alike else look for name, look in looks.items()}
    return {
        "type": "scene",
        "instruction": env.task_description,
        "objects": objects,
        "cameras": list(env.cameras),
        "max_steps": MAX_STEPS,
    }


def observe(env: Env, contract: PolicyContract, seed: int) -> Observation:
    """Return the model's observation of the present state."""
    return Observation(
        images={camera: env.picture(camera, contract.image_size) for camera in contract.cameras},
        state=env.resting_action(),
        instruction=env.task_description,
        robot=env.embodiment,
        seed=seed,
    )


def move_object(env: Env, command: Mapping[str, Any]) -> None:
    """Shift an object by `dx`, `dy` [m].

    Raises BlmError for an unknown object or too large a shift.
    """
    shift = [command.get("dx"), command.get("dy")]
    if not all(isinstance(value, int | float) and abs(value) <= MAX_SHIFT for value in shift):
        raise BlmError(f"dx and dy are numbers of at most {MAX_SHIFT} m, got {reprlib.repr(shift)}")
    name, objects = str(command.get("object"))[:80], env.objects()
    by = np.array([float(shift[0] or 0), float(shift[1] or 0), 0.0])
    offset = (lookup("object", name, objects).position + by)[:2] - env.task_spec.region(env.robot).centre
    if np.abs(offset).max() > TABLE_HALF:
        raise BlmError(
            f"the {name} would leave the table; it may be at most {TABLE_HALF} m from the table's centre"
        )
    env.shift_object(name, by)


def set_light(env: Env, command: Mapping[str, Any]) -> None:
    """Set the `brightness` of all light. Raises BlmError for a value outside LIGHT."""
    brightness = command.get("brightness")
    if not isinstance(brightness, int | float) or not LIGHT[0] <= brightness <= LIGHT[1]:
        raise BlmError(
            f"the brightness is a number from {LIGHT[0]} to {LIGHT[1]}, got {reprlib.repr(brightness)}"
        )
    state = env.get_state()
    light = replace(state.variation.light, brightness=float(brightness))
    env.set_state(replace(state, variation=replace(state.variation, light=light)))


def data_uri(image: ImageArray, image_format: Literal["PNG", "JPEG"]) -> str:
    """Encode uint8 [height, width, 3] as a data URI."""
    buffer = io.BytesIO()
    Pillow.fromarray(image).save(buffer, image_format, quality=85)
    return f"data:image/{image_format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
