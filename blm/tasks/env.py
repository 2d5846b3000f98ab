"""The environment of any robot and task in MuJoCo: scene, physics, contacts and cameras.

`TaskEnv` defines actions, observations, seeds and frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from blm.robots.build import FINGERS
from blm.tasks.arm_starts import offset_start, random_start
from blm.tasks.clutter import draw_solids, resize
from blm.tasks.distractors import Distractors, draw_distractors, show_distractors
from blm.tasks.naming import Naming
from blm.tasks.rendering import Renderer
from blm.tasks.scene import CAMERAS, SUBSTEPS, paint_items
from blm.tasks.scene_variation import SceneModel, needs_dressing
from blm.tasks.sensing import Sensors
from blm.tasks.spec import Item, ObjectState, Placement, SceneDraw
from blm.tasks.task_env import RENDER_SIZE, TaskEnv, episode_stream
from blm.tasks.variation import Variation
from blm.tasks.visibility import draw_until_visible
from blm.types import ContractError, FloatArray, ImageArray, lookup

_PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION
_GRASP_CONE = np.cos(np.radians(85))
"""A finger's force counts if it is within 85 deg of the closing axis (ManiSkill, is_grasping)."""


@dataclass(frozen=True, eq=False)
class EnvState:
    """The complete state of an episode, from which `Env.set_state` continues it exactly."""

    physics: FloatArray
    """MuJoCo's mjSTATE_INTEGRATION: positions, velocities, targets, marker poses, solver warm
    start."""
    steps: int
    instruction: str
    naming: Naming
    items: tuple[Item, ...]
    distractors: Distractors
    seed: int
    """Seed of the episode, from which the errors of its sensors are drawn."""
    variation: Variation
    start: Mapping[str, FloatArray]
    """Position of each object at the start of the episode, [3]."""
    went_wrong: bool
    """Whether `TaskSpec.wrong` has held after a step."""
    delivered: Mapping[str, ImageArray]
    """Camera -> the picture that it delivered last, if the variation drops pictures."""


class Env(TaskEnv):
    """A robot at a table with one task, simulated in MuJoCo.

    A varied episode has a model of its own, so `model` and `data` may be others after a reset.
    """

    def _make_simulator(self) -> None:
        self._distractors: Distractors = ()
        self._models: dict[int | None, SceneModel] = {}
        self._renderers: dict[bool, Renderer] = {}
        self._use(self.variation)

    def _use(self, variation: Variation) -> SceneModel:
        """Switch to the model in which a variation can be shown, and return it."""
        solid = variation.clutter.distractors if needs_dressing(variation) else None
        if solid not in self._models:
            self._models[solid] = SceneModel(self.robot, self.task_spec, self._extra, solid)
        self._scene = self._models[solid]
        self.model, self.data = self._scene.model, self._scene.data
        return self._scene

    def _start_episode(self, seed: int, draw: SceneDraw, arm_start: str) -> None:
        clutter = self.variation.clutter
        draw = resize(draw, clutter.scale)
        self.items = draw.items
        ghosts = draw_distractors(
            episode_stream(seed, "distractors"), self.robot, self.items, draw.placement, self._extra
        )
        solids = draw_solids(
            episode_stream(seed, "clutter"), self.robot, self.task_spec, draw, ghosts, clutter
        )
        self._distractors = ghosts + solids
        self._dress()
        mujoco.mj_resetData(self.model, self.data)
        self._set_item_poses({**draw.placement, **{item.name: where for item, where in self._distractors}})
        arm_rng = episode_stream(seed, "arm")
        home = np.array(self.robot.home)
        start = home + arm_rng.normal(0, self.robot.reset_noise, len(home))
        self.place_arm(start, opening=1.0)
        if arm_start == "random":
            random_start(self, arm_rng)
        elif self.variation.arm_offset:
            offset_start(self, arm_rng, self.variation.arm_offset)
        self._refresh()

    def _show_goals(self, draw_again: Callable[[], None]) -> None:
        draw_until_visible(self, draw_again)

    def _dress(self) -> None:
        """Show the colours, distractors and variation of the present episode."""
        scene = self._use(self.variation)
        if scene.is_dressed:
            scene.dress(self.variation, self.items, self._distractors)
        else:
            paint_items(self.model, self.items)
        show_distractors(self.model, [(i, where) for i, where in self._distractors if i.role == "marker"])

    def _simulate(self, target: FloatArray) -> None:
        change = self.variation.dynamics
        if self._steps == change.move_goal_at:
            goal = self.task_spec.goal or self.task_spec.object
            self.shift_object(self.naming.swap.get(goal, goal), np.array([*change.move_goal_by, 0.0]))
        self.data.ctrl[:] = (*target[:-1], target[-1] * self.robot.gripper.stroke)
        with self._timed("physics"):
            mujoco.mj_step(self.model, self.data, nstep=SUBSTEPS)
        self._refresh()

    def state(self) -> NDArray[np.float32]:
        """Joint positions [rad] and measured gripper opening, float32 [D]."""
        return np.append(self.data.qpos[self._arm], self.gripper_opening).astype(np.float32)

    def get_state(self) -> EnvState:
        """Return a copy of the complete state."""
        physics = np.empty(mujoco.mj_stateSize(self.model, _PHYSICS))
        mujoco.mj_getState(self.model, self.data, physics, _PHYSICS)
        return EnvState(
            physics=physics,
            steps=self._steps,
            instruction=self.task_description,
            naming=self.naming,
            items=self.items,
            distractors=self._distractors,
            seed=self._seed,
            variation=self.variation,
            start=dict(self._start),
            went_wrong=self._went_wrong,
            delivered=dict(self._sensors.delivered),
        )

    def set_state(self, state: EnvState) -> None:
        """Continue from the state of an Env of the same robot, task and distractors."""
        before = self.variation
        size = mujoco.mj_stateSize(self._use(state.variation).model, _PHYSICS)
        count = self._extra + state.variation.clutter.distractors
        if state.physics.shape != (size,) or len(state.distractors) != count:
            self._use(before)
            raise ContractError(
                f"a state of {state.physics.size} numbers and {len(state.distractors)} distractors is not of "
                f"'{self.embodiment}' in '{self.task}' with {count} distractors ({size} numbers)"
            )
        self._steps = state.steps
        self.task_description = state.instruction
        self.naming = state.naming
        self.items = state.items
        self.variation = state.variation
        self._start = dict(state.start)
        self._went_wrong = state.went_wrong
        self._distractors = state.distractors
        self._seed = state.seed
        self._sensors = Sensors(state.variation.sensors, state.seed, state.delivered)
        self._dress()
        mujoco.mj_setState(self.model, self.data, state.physics, _PHYSICS)
        self._refresh()

    def objects(self) -> dict[str, ObjectState]:
        """Return the present state of every item and distractor by name."""
        items = (*self.items, *(item for item, _ in self._distractors))
        return {item.name: self._object(item) for item in items}

    @property
    def solid_distractors(self) -> tuple[Item, ...]:
        """The distractors of the present episode that collide with everything."""
        return tuple(item for item, _ in self._distractors if item.role != "marker")

    def shift_object(self, name: str, by: FloatArray) -> None:
        """Move an item by a displacement [3] in m and set its velocity to 0.

        The robot did not do it, so a displaced item starts anew where it is put.
        """
        body = self._body(name)
        position, quaternion = body.xpos + by, body.xquat.copy()
        if self.model.body(name).mocapid[0] < 0:
            self.data.joint(name).qvel[:] = 0
        self._set_item_poses({name: ((*position.tolist(),), (*quaternion.tolist(),))})
        self._start[name] = self._start[name] + by
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

    def arm_speed(self) -> float:
        return float(np.abs(self.data.qvel[self._arm]).max())

    def picture(self, camera: str, size: int | None = None) -> ImageArray:
        """Return uint8 [size, size, 3] (default: image_size) from any camera of the scene."""
        lookup("camera", camera, CAMERAS)
        with self._timed("rendering"):
            return self._ready_renderer().rgb(self.data, camera, size or self.image_size)

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

    def mask(self, name: str, camera: str, size: int | None = None) -> NDArray[np.bool_]:
        """Return the segmentation mask of an object, bool [size, size] (default: image_size)."""
        return np.append(self.model.geom_bodyid, 0)[self.geoms(camera, size)] == self._body(name).id

    def geoms(self, camera: str, size: int | None = None) -> NDArray[np.int64]:
        """Return the geom id of each pixel, -1 for the wall, int64 [size, size] (default: image_size)."""
        lookup("camera", camera, CAMERAS)
        return self._ready_renderer().geoms(self.data, camera, size or self.image_size)

    def close(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()

    def _ready_renderer(self) -> Renderer:
        """Return a renderer of the present model; all dressed models share one."""
        scene = self._scene
        if scene.is_dressed not in self._renderers:
            self._renderers[scene.is_dressed] = Renderer(self.model, max(self.image_size, RENDER_SIZE))
        renderer = self._renderers[scene.is_dressed]
        renderer.show(self.model, scene.textures, shadows=scene.shadows)
        return renderer

    def _body(self, name: str) -> Any:
        names = [*(item.name for item in self.items), *(item.name for item, _ in self._distractors)]
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

    def place_arm(self, angles: FloatArray, opening: float) -> None:
        """Set the joint positions [rad] of arm and fingers, clipped to the limits, and the same targets."""
        self.data.qpos[self._arm] = np.clip(angles, *self.model.jnt_range[self._arm].T)
        for finger in FINGERS:
            self.data.joint(finger).qpos[0] = opening * self.robot.gripper.stroke
        self.data.ctrl[:] = (*self.data.qpos[self._arm], opening * self.robot.gripper.stroke)

    def _refresh(self) -> None:
        """Update derived quantities; keep the solver's warm start, which is part of a state."""
        warm = self.data.qacc_warmstart.copy()
        mujoco.mj_forward(self.model, self.data)
        self.data.qacc_warmstart[:] = warm
