"""One environment for every robot and task (Gymnasium API).

An action follows the robot's `ActionSpace`: absolute joint targets [rad] and the gripper opening (0
closed, 1 open), held for one control step of 50 ms. Targets beyond the limits are clipped. An
observation is {"pixels": {camera: uint8 [H, W, 3]}, "agent_pos": float32 [D]}. The same seed gives
the same episode, bit for bit, on the same machine and versions. World frame: x forward from the
robot, y left, z up, table top at z = 0.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from blm.robots import ROBOTS
from blm.robots.build import FINGERS
from blm.tasks.appearance import PLAIN, Appearance, AppearanceRandomizer
from blm.tasks.distractors import Distractors, draw_distractors, show_distractors
from blm.tasks.registry import TASKS
from blm.tasks.rendering import Renderer
from blm.tasks.scene import CAMERAS, SUBSTEPS, build_model
from blm.tasks.spec import Item, ObjectState, Placement, TaskState
from blm.types import BlmError, ContractError, FloatArray, ImageArray, Observation, lookup

_PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION
_RENDER_SIZE = 480
_GRASP_CONE = np.cos(np.radians(85))
"""A finger's force counts if it is within 85 deg of the closing axis (ManiSkill, is_grasping)."""
_ATTEMPTS = 5000
"""Number of arm poses that are tried for a random start."""


@dataclass(frozen=True, eq=False)
class EnvState:
    """The complete state of an episode, from which `Env.set_state` continues it exactly."""

    physics: FloatArray
    """MuJoCo's mjSTATE_INTEGRATION: positions, velocities, targets, marker poses, solver warm
    start."""
    steps: int
    instruction: str
    distractors: Distractors
    appearance_seed: int
    """Seed of the episode's appearance."""


class Env(gymnasium.Env[dict[str, Any], NDArray[np.float32]]):
    """A robot at a table with one task; `robot` and `task` are names in ROBOTS and TASKS."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012  # as Gymnasium declares it
    render_mode = "rgb_array"

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
        appearance: Appearance = PLAIN,
    ) -> None:
        self._describe(robot, task, cameras, image_size, distractors)
        self.model = build_model(self.robot, self.task_spec, distractors)
        self.data = mujoco.MjData(self.model)
        self._randomizer = AppearanceRandomizer(self.model, appearance)
        self._appearance_seed = 0
        self._max_episode_steps = self.task_spec.max_steps if max_steps is None else max_steps
        self._terminate = terminate_on_success
        self._extra = distractors
        self._steps = 0
        self._distractors: Distractors = ()
        self._renderer: Renderer | None = None

    def _describe(
        self, robot: str, task: str, cameras: Iterable[str], image_size: int, distractors: int
    ) -> None:
        """Set the attributes that are independent of the simulator.

        Raises BlmError for invalid arguments.
        """
        self.robot = lookup("robot", robot, ROBOTS)
        self.task = task
        self.embodiment = robot
        self.task_spec = lookup("task", task, TASKS)
        self.task_description = self.task_spec.instruction(0)
        self.cameras, self.image_size = tuple(cameras), image_size
        for camera in self.cameras:
            lookup("camera", camera, CAMERAS)
        if not 16 <= image_size <= 1024 or not 0 <= distractors <= 20:
            raise BlmError(f"image_size {image_size} must be 16..1024, distractors {distractors} 0..20")
        self.items = self.task_spec.items(self.robot)
        self.seconds = {"physics": 0.0, "rendering": 0.0}
        """Time spent in physics and rendering since the environment was made [s]."""
        space = self.contract_space = self.robot.action_space
        self._low = np.array(space.low)
        self._high = np.array(space.high)
        self._arm = slice(0, space.dim - 1)
        self.action_space = spaces.Box(self._low.astype(np.float32), self._high.astype(np.float32))
        picture = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = spaces.Dict({
            "pixels": spaces.Dict(dict.fromkeys(self.cameras, picture)),
            "agent_pos": spaces.Box(-np.inf, np.inf, (space.dim,), np.float32),
        })  # fmt: skip

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start the episode of `seed`. Options: "phrasing" (index), "arm" ("home" or "random").

        Raises BlmError for an unknown option, phrasing or arm start.
        """
        super().reset(seed=seed)
        chosen = self._reset_options(options)
        lookup("arm start", chosen["arm"], {"home": 0, "random": 0})
        if seed is None:
            seed = self._free_seed()
        placement_rng, phrasing_rng, distractor_rng, arm_rng = (
            np.random.default_rng((seed, stream)) for stream in range(4)
        )
        phrasing = chosen["phrasing"]
        if phrasing is None:
            phrasing = int(phrasing_rng.integers(len(self.task_spec.phrasings)))
        self.task_description, self._steps = self.task_spec.instruction(phrasing), 0
        mujoco.mj_resetData(self.model, self.data)
        placement = self.task_spec.sample(placement_rng, self.robot, self.task_spec.region(self.robot))
        self._distractors = draw_distractors(distractor_rng, self.robot, self.items, placement, self._extra)
        show_distractors(self.model, self._distractors)
        self._appearance_seed = seed
        self._randomizer.apply(seed)
        self._set_item_poses({**placement, **{item.name: where for item, where in self._distractors}})
        home = np.array(self.robot.home)
        self._set_arm(home + arm_rng.normal(0, self.robot.reset_noise, len(home)), opening=1.0)
        if chosen["arm"] == "random":
            self._randomise_arm(arm_rng)
        self._refresh()
        return self.observe(), self._info()

    @staticmethod
    def _reset_options(options: dict[str, Any] | None) -> dict[str, Any]:
        """Return the options of a reset with their defaults. Raises UnknownNameError for another option."""
        chosen: dict[str, Any] = {"arm": "home", "phrasing": None}
        for option in options or {}:
            lookup("reset option", option, chosen)
        return chosen | (options or {})

    def _free_seed(self) -> int:
        """Draw a seed beyond all reserved ranges of seeds."""
        return int(self.np_random.integers(10_000_000, 2**31))

    def step(self, action: NDArray[np.float32]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Hold the targets for one control step. Raises ContractError on a wrong shape or a NaN."""
        target = np.clip(self.contract_space.check_state(action, "action"), self._low, self._high)
        self.data.ctrl[:] = (*target[:-1], target[-1] * self.robot.gripper.stroke)
        began = time.perf_counter()
        mujoco.mj_step(self.model, self.data, nstep=SUBSTEPS)
        self.seconds["physics"] += time.perf_counter() - began
        self._steps += 1
        self._refresh()
        info = self._info()
        done = info["success"] and self._terminate
        late = self._steps >= self._max_episode_steps
        return self.observe(), float(info["success"]), done, late, info

    def observe(self) -> dict[str, Any]:
        """Render all cameras and return the present observation."""
        pixels = {camera: self.picture(camera) for camera in self.cameras}
        return {"pixels": pixels, "agent_pos": self.state()}

    def observation(self, seed: int = 0) -> Observation:
        """Return the present observation as a `types.Observation`.

        `seed` is the policy's sampling seed.
        """
        pixels, state = self.observe().values()
        return Observation(
            images=pixels, state=state, instruction=self.task_description, robot=self.embodiment, seed=seed
        )

    def state(self) -> NDArray[np.float32]:
        """Joint positions [rad] and measured gripper opening, float32 [D]."""
        return np.append(self.data.qpos[self._arm], self.gripper_opening).astype(np.float32)

    def get_state(self) -> EnvState:
        """Return a copy of the complete state."""
        physics = np.empty(mujoco.mj_stateSize(self.model, _PHYSICS))
        mujoco.mj_getState(self.model, self.data, physics, _PHYSICS)
        return EnvState(physics, self._steps, self.task_description, self._distractors, self._appearance_seed)

    def set_state(self, state: EnvState) -> None:
        """Continue from the state of an Env of the same robot, task and distractors."""
        size = mujoco.mj_stateSize(self.model, _PHYSICS)
        if state.physics.shape != (size,) or len(state.distractors) != self._extra:
            raise ContractError(
                f"a state of {state.physics.size} numbers and {len(state.distractors)} distractors is not of "
                f"'{self.embodiment}' in '{self.task}' with {self._extra} distractors ({size} numbers)"
            )
        self._steps = state.steps
        self.task_description = state.instruction
        self._distractors = state.distractors
        show_distractors(self.model, self._distractors)
        self._appearance_seed = state.appearance_seed
        self._randomizer.apply(state.appearance_seed)
        mujoco.mj_setState(self.model, self.data, state.physics, _PHYSICS)
        self._refresh()

    def objects(self) -> dict[str, ObjectState]:
        """Return the present state of every item and distractor by name."""
        items = (*self.items, *(item for item, _ in self._distractors))
        return {item.name: self._object(item) for item in items}

    def shift_object(self, name: str, by: FloatArray) -> None:
        """Move an item by a displacement [3] in m and set its velocity to 0."""
        body = self._body(name)
        position, quaternion = body.xpos + by, body.xquat.copy()
        if self.model.body(name).mocapid[0] < 0:
            self.data.joint(name).qvel[:] = 0
        self._set_item_poses({name: ((*position.tolist(),), (*quaternion.tolist(),))})
        self._refresh()

    def tcp(self) -> tuple[FloatArray, FloatArray]:
        """Return world position [3] and rotation [3, 3] of the tool centre point.

        The rotation's z column is the approach direction, its y column the closing axis.
        """
        site = self.data.site("tcp")
        return site.xpos.copy(), site.xmat.reshape(3, 3).copy()

    @property
    def gripper_opening(self) -> float:
        """Measured gripper opening: 0 closed .. 1 open."""
        travel = [float(self.data.joint(finger).qpos[0]) for finger in FINGERS]
        return float(np.clip(np.mean(travel) / self.robot.gripper.stroke, 0.0, 1.0))

    def is_grasping(self, name: str) -> bool:
        """Whether both fingers press on the item with at least the grasp force."""
        body = self._body(name).id
        closing = self.tcp()[1][:, 1]
        owner = self.model.geom_bodyid
        forces = {self.model.body(finger).id: np.zeros(3) for finger in FINGERS}
        wrench = np.zeros(6)
        for index, contact in enumerate(self.data.contact):
            one, other = owner[contact.geom[0]], owner[contact.geom[1]]
            if body in (one, other) and (finger := one + other - body) in forces:
                mujoco.mj_contactForce(self.model, self.data, index, wrench)
                forces[finger] += (1 if other == body else -1) * contact.frame.reshape(3, 3).T @ wrench[:3]
        return all(
            (size := np.linalg.norm(force)) >= self.robot.gripper.grasp_force
            and abs(force @ closing) >= _GRASP_CONE * size
            for force in forces.values()
        )

    def evaluate(self) -> dict[str, bool]:
        """Return the task's conditions in the present state; one of them is "success"."""
        grasped = frozenset(i.name for i in self.items if i.role == "free" and self.is_grasping(i.name))
        speed = float(np.abs(self.data.qvel[self._arm]).max())
        return self.task_spec.success(TaskState(self.robot, self.objects(), speed, grasped))

    def picture(self, camera: str, size: int | None = None) -> ImageArray:
        """Return uint8 [size, size, 3] (default: image_size) from any camera of the scene."""
        lookup("camera", camera, CAMERAS)
        began = time.perf_counter()
        picture = self._ensure_renderer().rgb(self.data, camera, size or self.image_size)
        self.seconds["rendering"] += time.perf_counter() - began
        return picture

    def render(self) -> ImageArray:
        """Return a larger picture of the camera "base", for people."""
        return self.picture("base", _RENDER_SIZE)

    def project(self, points: FloatArray, camera: str) -> FloatArray:
        """Project world points [N, 3] into a camera.

        Return u (right), v (down) [px] and depth [m], [N, 3].

        The first pixel spans 0..1.
        """
        lookup("camera", camera, CAMERAS)
        view, centre = self.data.cam(camera), self.image_size / 2
        x, y, z = ((np.asarray(points) - view.xpos) @ view.xmat.reshape(3, 3)).T
        focal = centre / np.tan(np.radians(self.model.cam(camera).fovy[0]) / 2)
        return np.stack([centre - focal * x / z, centre + focal * y / z, -z], axis=1)

    def mask(self, name: str, camera: str) -> NDArray[np.bool_]:
        """Return the segmentation mask of an object, bool [image_size, image_size]."""
        lookup("camera", camera, CAMERAS)
        geoms = self._ensure_renderer().geoms(self.data, camera, self.image_size)
        return np.append(self.model.geom_bodyid, 0)[geoms] == self._body(name).id

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _ensure_renderer(self) -> Renderer:
        if self._renderer is None:
            self._renderer = Renderer(self.model, max(self.image_size, _RENDER_SIZE))
        return self._renderer

    def _body(self, name: str) -> Any:
        names = [*(item.name for item in self.items), *(f"distractor{i}" for i in range(self._extra))]
        lookup("object", name, dict.fromkeys(names))
        return self.data.body(name)

    def _object(self, item: Item) -> ObjectState:
        body = self.data.body(item.name)
        pose = body.xpos.copy(), body.xquat.copy()
        speed = spin = 0.0
        if item.role == "free":
            velocity = self.data.joint(item.name).qvel  # linear in the world frame, angular in the body's
            speed = float(np.linalg.norm(velocity[:3]))
            spin = float(np.linalg.norm(velocity[3:]))
        return ObjectState(item.name, item.kind, item.color, *pose, item.parts[0].size, speed, spin)

    def _set_item_poses(self, placement: Placement) -> None:
        for name, (position, quaternion) in placement.items():
            index = self.model.body(name).mocapid[0]
            if index < 0:
                self.data.joint(name).qpos[:] = (*position, *quaternion)
            else:
                self.data.mocap_pos[index] = position
                self.data.mocap_quat[index] = quaternion

    def _set_arm(self, angles: FloatArray, opening: float) -> None:
        """Set the joint positions of arm and fingers, and the same targets."""
        self.data.qpos[self._arm] = np.clip(angles, self._low[:-1], self._high[:-1])
        for finger in FINGERS:
            self.data.joint(finger).qpos[0] = opening * self.robot.gripper.stroke
        self.data.ctrl[:] = (*self.data.qpos[self._arm], opening * self.robot.gripper.stroke)

    def _randomise_arm(self, rng: np.random.Generator) -> None:
        """Draw an arm pose near home: tool above the workspace, pointing down, no contact."""
        area, home = self.robot.workspace, np.array(self.robot.home)
        owners = self.model.geom_bodyid
        robot_geoms = (owners > 0) & (owners <= self.model.body(FINGERS[1]).id)
        for _ in range(_ATTEMPTS):
            self._set_arm(home + rng.uniform(-0.7, 0.7, len(home)), opening=float(rng.uniform()))
            mujoco.mj_kinematics(self.model, self.data)
            position, rotation = self.tcp()
            inside = (np.abs(position[:2] - area.centre) <= area.half + 0.05).all()
            if inside and 0.05 <= position[2] <= area.height + 0.1 and rotation[2, 2] < -0.8:
                mujoco.mj_collision(self.model, self.data)
                if not robot_geoms[self.data.contact.geom].any():
                    return
        raise BlmError(f"found no free arm pose for '{self.embodiment}' in {_ATTEMPTS} draws")

    def _refresh(self) -> None:
        """Update derived quantities; keep the solver's warm start, which is part of a state."""
        warm = self.data.qacc_warmstart.copy()
        mujoco.mj_forward(self.model, self.data)
        self.data.qacc_warmstart[:] = warm

    def _info(self) -> dict[str, Any]:
        flags = self.evaluate()
        head = {"task": self.task, "instruction": self.task_description, "is_success": flags["success"]}
        return head | flags
