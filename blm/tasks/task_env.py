"""The environment of any robot and task, whichever simulator runs it (Gymnasium API).

An action follows the robot's `ActionSpace`: absolute joint targets [rad] and the gripper opening (0
closed, 1 open), held for one control step of 50 ms. Targets beyond the limits are clipped. An
observation is {"pixels": {camera: uint8 [H, W, 3]}, "agent_pos": float32 [D]}. The same seed gives
the same episode, bit for bit, on the same machine and versions. World frame: x forward from the
robot, y left, z up, table top at z = 0.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypedDict

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from blm.robots import ROBOTS
from blm.tasks.naming import Naming, fill_slots, name_things
from blm.tasks.randomization import NO_RANDOMIZATION, DomainRandomization
from blm.tasks.registry import TASKS
from blm.tasks.reset_options import ResetOptions
from blm.tasks.scene import CAMERAS
from blm.tasks.sensing import Sensors
from blm.tasks.spec import ObjectState, SceneDraw, TaskState, exchange
from blm.tasks.variation import PLAIN as NO_VARIATION
from blm.tasks.variation import Variation
from blm.types import BlmError, FloatArray, ImageArray, Observation, lookup

_STREAMS = {
    "placement": 0,
    "phrasing": 1,
    "distractors": 2,
    "arm": 3,
    "clutter": 5,
    "variation": 7,
}
"""Random stream -> its number; each is independent of the others, and of the sensors' stream 6."""
RENDER_SIZE = 480
"""Side of the pictures for people [px]."""


class EnvObservation(TypedDict):
    """An observation in LeRobot's form."""

    pixels: dict[str, ImageArray]
    """Camera -> uint8 [H, W, 3]."""
    agent_pos: NDArray[np.float32]
    """Joint positions [rad] and measured gripper opening, [D]."""


def episode_stream(seed: int, name: str) -> np.random.Generator:
    """Return one of the random streams of an episode; `name` is in `_STREAMS`."""
    return np.random.default_rng((seed, _STREAMS[name]))


def random_seed(rng: np.random.Generator) -> int:
    """Return the seed of an episode for which none is stated, beyond all reserved ranges of seeds."""
    return int(rng.integers(10_000_000, 2**31))


def draw_scene(robot: str, task: str, seed: int) -> SceneDraw:
    """Return the scene of an episode, before any variation."""
    arm = lookup("robot", robot, ROBOTS)
    return lookup("task", task, TASKS).draw(episode_stream(seed, "placement"), arm)


class TaskEnv(gymnasium.Env[EnvObservation, NDArray[np.float32]], ABC):
    """A robot at a table with one task; `robot` and `task` are names in ROBOTS and TASKS.

    Seeds, episodes and observations are defined here; a subclass adds the simulator.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012  # as Gymnasium declares it
    render_mode: str | None = "rgb_array"

    def __init__(
        self,
        robot: str,
        task: str,
        *,
        cameras: Iterable[str] = ("base", "wrist"),
        image_size: int = 112,
        max_steps: int | None = None,
        terminate_on_success: bool = True,
        distractors: int = 0,
        randomization: DomainRandomization = NO_RANDOMIZATION,
    ) -> None:
        """Raises BlmError for invalid arguments."""
        self.robot = lookup("robot", robot, ROBOTS)
        self.task = task
        self.embodiment = robot
        self.task_spec = lookup("task", task, TASKS)
        self.task_description = self.task_spec.instruction(0)
        self.cameras = tuple(cameras)
        self.image_size = image_size
        for camera in self.cameras:
            lookup("camera", camera, CAMERAS)
        if not 16 <= image_size <= 1024 or not 0 <= distractors <= 20:
            raise BlmError(f"image_size {image_size} must be 16..1024, distractors {distractors} 0..20")
        self.items = self.task_spec.items(self.robot)
        self.variation = NO_VARIATION
        """How the present episode differs from the plain suite."""
        self.naming = Naming()
        """Which things the instruction of the present episode names."""
        self._went_wrong = False
        self._start: dict[str, FloatArray] = {}
        self._seed = 0
        self._sensors = Sensors(NO_VARIATION.sensors, 0)
        self.seconds = {"physics": 0.0, "rendering": 0.0}
        """Time spent in physics and rendering since the environment was made [s]."""
        self._max_episode_steps = self._default_max_steps() if max_steps is None else max_steps
        self._terminate = terminate_on_success
        self._extra = distractors
        self.randomization = randomization
        """Distribution of the variation of episodes whose reset states none."""
        self._steps = 0
        self._make_spaces()
        self._make_simulator()

    def _make_spaces(self) -> None:
        space = self.contract_space = self.robot.action_space
        self._low = np.array(space.low)
        self._high = np.array(space.high)
        self._arm = slice(0, space.dim - 1)
        self.action_space = spaces.Box(self._low.astype(np.float32), self._high.astype(np.float32))
        picture = spaces.Box(0, 255, (self.image_size, self.image_size, 3), np.uint8)
        self.observation_space = spaces.Dict({  # type: ignore[assignment]  # it is a Space of any dict
            "pixels": spaces.Dict(dict.fromkeys(self.cameras, picture)),
            "agent_pos": spaces.Box(-np.inf, np.inf, (space.dim,), np.float32),
        })  # fmt: skip

    # --- what a simulator adds ---

    @abstractmethod
    def _make_simulator(self) -> None:
        """Build the scene of `robot`, `task_spec` and `_extra` distractors.

        Raises BlmError if the simulator does not have it.
        """

    def _default_max_steps(self) -> int:
        """Return the step limit of an episode if the caller states none."""
        return self.task_spec.max_steps

    def _check_arm_start(self, start: str) -> None:
        """Raise BlmError for an invalid value of the reset option "arm"."""
        lookup("arm start", start, {"home": 0, "random": 0})

    def _check_variation(self, variation: Variation) -> None:
        """Raise BlmError for a variation that this simulator cannot show."""

    @abstractmethod
    def _start_episode(self, seed: int, draw: SceneDraw, arm_start: str) -> None:
        """Put the scene `draw` of `seed`, with `variation`, into its initial state."""

    def _show_goals(self, draw_again: Callable[[], None]) -> None:
        """Call `draw_again` until no goal is hidden, in a simulator that draws scenes itself."""
        raise BlmError("visible_goals needs the simulator mujoco: this one draws its own scenes")

    @abstractmethod
    def _simulate(self, target: FloatArray) -> None:
        """Hold joint targets [rad] and gripper opening, [D], for one control step."""

    @abstractmethod
    def state(self) -> NDArray[np.float32]:
        """Joint positions [rad] and measured gripper opening, float32 [D]."""

    def resting_action(self) -> NDArray[np.float32]:
        """Return the action that holds the arm where it is, [D]."""
        return self.state()

    @property
    @abstractmethod
    def gripper_opening(self) -> float:
        """Measured gripper opening: 0 closed .. 1 open."""

    @abstractmethod
    def tcp(self) -> tuple[FloatArray, FloatArray]:
        """Return world position [3] and rotation [3, 3] of the tool centre point.

        The rotation's z column is the approach direction, its y column the closing axis.
        """

    @abstractmethod
    def arm_speed(self) -> float:
        """Return the largest absolute joint speed of the arm [rad/s]."""

    @abstractmethod
    def objects(self) -> dict[str, ObjectState]:
        """Return the present state of every item and distractor by name."""

    @abstractmethod
    def is_grasping(self, name: str) -> bool:
        """Whether both fingers press on the item with at least the grasp force."""

    @abstractmethod
    def picture(self, camera: str, size: int | None = None) -> ImageArray:
        """Return uint8 [size, size, 3] (default: image_size) from any camera of the scene."""

    # --- episodes ---

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[EnvObservation, dict[str, Any]]:
        """Start the episode of `seed`; `options` are the fields of `ResetOptions`.

        Raises BlmError for an unknown option, phrasing or arm start, for a wording with an unknown
        slot, and for a variation or visible goals that the simulator cannot show.
        """
        super().reset(seed=seed)
        chosen = ResetOptions.read(options)
        self._check_arm_start(chosen.arm)
        seed = random_seed(self.np_random) if seed is None else seed
        variation = chosen.variation or self.randomization.draw(episode_stream(seed, "variation"))
        self._check_variation(variation)
        self.variation = variation
        begin = partial(self._begin, seed, episode_stream(seed, "placement"), chosen)
        begin()
        if chosen.visible_goals:
            self._show_goals(begin)
        return self.observe(), self._info()

    def _begin(self, seed: int, placement: np.random.Generator, options: ResetOptions) -> None:
        """Start an episode with the next scene of the stream `placement`."""
        spec = self.task_spec
        draw = spec.draw(placement, self.robot)
        grammar = self.randomization.wordings
        wording = options.instruction(spec, episode_stream(seed, "phrasing"), grammar=grammar)
        self.naming = name_things(spec, draw, options.named)
        self.task_description = fill_slots(spec, wording, self.naming.words)
        self.items = draw.items
        self._seed, self._steps = seed, 0
        self._sensors = Sensors(self.variation.sensors, seed)
        self._start_episode(seed, draw, options.arm)
        self._went_wrong = False
        self._start = {name: thing.position for name, thing in self.objects().items()}

    def step(self, action: NDArray[np.float32]) -> tuple[EnvObservation, float, bool, bool, dict[str, Any]]:
        """Hold the targets for one control step. Raises ContractError on a wrong shape or a NaN."""
        target = np.clip(self.contract_space.check_state(action, "action"), self._low, self._high)
        self._simulate(target)
        self._steps += 1
        info = self._info()
        self._went_wrong = info.get("is_wrong_object", False)
        done = info["success"] and self._terminate
        late = self._steps >= self._max_episode_steps
        return self.observe(), float(info["success"]), done, late, info

    def observe(self, cameras: Iterable[str] | None = None) -> EnvObservation:
        """Return the present observation of these cameras (default: `cameras`), with sensor errors.

        The errors follow from the seed of the episode and the step: observing twice gives the same.
        """
        pixels = {
            camera: self._sensors.picture(camera, self._steps, partial(self.picture, camera))
            for camera in (self.cameras if cameras is None else cameras)
        }
        return {"pixels": pixels, "agent_pos": self._sensors.state(self.state(), self._steps)}

    def observation(self, seed: int = 0, cameras: Iterable[str] | None = None) -> Observation:
        """Return `observe(cameras)` as a `types.Observation`; `seed` is the policy's sampling seed."""
        seen = self.observe(cameras)
        return Observation(
            images=seen["pixels"],
            state=seen["agent_pos"],
            instruction=self.task_description,
            robot=self.embodiment,
            seed=seed,
        )

    def named_objects(self) -> dict[str, ObjectState]:
        """Return the present state of every object by its part in the present instruction."""
        return exchange(self.objects(), self.naming.swap)

    def task_state(self) -> TaskState:
        """Return the state that the task's success rule judges."""
        swap = self.naming.swap
        grasped = (i.name for i in self.items if i.role == "free" and self.is_grasping(i.name))
        return TaskState(
            self.robot,
            self.named_objects(),
            self.arm_speed(),
            frozenset(swap.get(name, name) for name in grasped),
            {name: self._start[swap.get(name, name)] for name in self._start},
        )

    def evaluate(self) -> dict[str, bool]:
        """Return the task's conditions in the present state; one of them is "success".

        In a task with another thing to name, "is_wrong_object" tells whether `TaskSpec.wrong` holds or
        has held after a step of this episode; then there is no success.
        """
        state = self.task_state()
        flags = self.task_spec.success(state)
        if self.task_spec.wrong is None:
            return flags
        wrong = self._went_wrong or self.task_spec.wrong(state)
        return {**flags, "is_wrong_object": wrong, "success": flags["success"] and not wrong}

    def render(self) -> ImageArray:
        """Return a larger picture of the camera "base", for people."""
        return self.picture("base", RENDER_SIZE)

    def _info(self) -> dict[str, Any]:
        flags = self.evaluate()
        head = {"task": self.task, "instruction": self.task_description, "is_success": flags["success"]}
        return head | flags

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Add the duration of the block to `seconds[part]`."""
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began
