"""ManiSkill 3.0.1's Panda tasks behind the interface of `Env`, to check our simulator.

Physics (PhysX), objects, initial states, success rules and meshes are ManiSkill's. Names, action
space, cameras and instructions are ours, so data and policies transfer between the simulators.
ManiSkill needs a separate Python environment (scripts/maniskill.sh); see docs/maniskill.md. A
seed gives another scene than in `Env`; the same seed gives the same episode, bit for bit, on one
machine.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from blm.robots import ROBOTS
from blm.tasks.randomization import NO_RANDOMIZATION
from blm.tasks.scene import CAMERAS
from blm.tasks.spec import Item, ObjectState, SceneDraw
from blm.tasks.task_env import TaskEnv
from blm.tasks.variation import PLAIN as NO_VARIATION
from blm.tasks.variation import Variation
from blm.types import BlmError, FloatArray, ImageArray, lookup

_HAND = "panda_hand"
"""Link that carries the wrist camera; its frame equals the frame of our hand."""
MAX_STEPS = 300
"""Step limit. ManiSkill's scripts are slower than our expert: LiftPegUpright takes up to 200 steps."""
_RANGE = (0.01, 100.0)
"""Near and far clipping planes of the cameras [m], as in ManiSkill."""


@dataclass(frozen=True)
class ManiSkillTask:
    """The ManiSkill task that corresponds to one of ours, with the names of its parts."""

    id: str
    objects: Mapping[str, str]
    """Our item -> attribute of the ManiSkill task."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Our condition -> ManiSkill's condition, if it reports one."""


MANISKILL_TASKS = {
    "push_cube": ManiSkillTask("PushCube-v1", {"cube": "obj", "target": "goal_region"}),
    "pull_cube": ManiSkillTask("PullCube-v1", {"cube": "obj", "target": "goal_region"}),
    "pick_cube": ManiSkillTask(
        "PickCube-v1",
        {"cube": "cube", "goal": "goal_site"},
        {"is_at_goal": "is_obj_placed", "is_robot_static": "is_robot_static", "is_grasped": "is_grasped"},
    ),
    "stack_cube": ManiSkillTask(
        "StackCube-v1",
        {"cube": "cubeA", "lower": "cubeB"},
        {
            "is_on_lower": "is_cubeA_on_cubeB",
            "is_cube_static": "is_cubeA_static",
            "is_grasped": "is_cubeA_grasped",
        },
    ),
    "place_sphere": ManiSkillTask(
        "PlaceSphere-v1",
        {"ball": "obj", "bin": "bin"},
        {"is_in_bin": "is_obj_on_bin", "is_ball_static": "is_obj_static", "is_grasped": "is_obj_grasped"},
    ),
    "lift_peg_upright": ManiSkillTask("LiftPegUpright-v1", {"peg": "peg"}),
}


def to_maniskill(action: FloatArray) -> FloatArray:
    """Convert our action [8] to `pd_joint_pos`: gripper 0..1 -> -1..1.

    Both ends have the same meaning. ManiSkill's finger targets are -0.01 m (to press) to 0.04 m,
    ours 0 to 0.04 m.
    """
    return np.append(action[:-1], 2 * np.float64(action[-1]) - 1).astype(np.float32)


def from_maniskill(action: FloatArray) -> FloatArray:
    """Convert an action of `pd_joint_pos` to ours: the inverse of `to_maniskill`."""
    return np.append(action[:-1], (np.float64(action[-1]) + 1) / 2).astype(np.float32)


def require_maniskill() -> None:
    """Import ManiSkill, which registers its tasks.

    Raises BlmError with installation instructions.
    """
    driver = Path(sys.prefix, "mesa", "icd.json")  # where scripts/maniskill.sh puts a software Vulkan
    if driver.exists() and not {"VK_ICD_FILENAMES", "VK_DRIVER_FILES"} & os.environ.keys():
        os.environ["VK_ICD_FILENAMES"] = str(driver)
    try:
        import mani_skill.envs
    except ImportError as error:
        raise BlmError(
            f"ManiSkill is not installed here ({error}); it needs a separate environment. Run "
            "scripts/maniskill.sh, then use .venv-maniskill/bin/python"
        ) from error
    mani_skill.logger.setLevel(logging.ERROR)  # its own tasks log warnings at each reset


class ManiSkillEnv(TaskEnv):
    """A robot at a table with one task, simulated in ManiSkill (PhysX)."""

    def _make_simulator(self) -> None:
        lookup("robot in ManiSkill", self.embodiment, {"panda": ROBOTS["panda"]})
        self._maniskill_task = lookup("task in ManiSkill", self.task, MANISKILL_TASKS)
        if self._extra or self.randomization != NO_RANDOMIZATION:
            raise BlmError(
                "ManiSkill's scenes cannot be changed: distractors and randomization.amplitude must be 0"
            )
        self._cameras: dict[tuple[str, int], Any] = {}
        self.simulation = self._make()
        """ManiSkill's own environment; `blm.planner.maniskill` runs its scripts on it."""

    def _default_max_steps(self) -> int:
        return MAX_STEPS

    def _make(self) -> Any:
        require_maniskill()
        import torch

        try:
            return gymnasium.make(
                self._maniskill_task.id,
                robot_uids="panda",
                obs_mode="none",
                reward_mode="none",
                control_mode="pd_joint_pos",
                sim_backend="physx_cpu",
                render_backend="gpu" if torch.cuda.is_available() else "cpu",
            ).unwrapped
        except RuntimeError as error:
            raise BlmError(
                f"ManiSkill cannot start: {error}. It needs a Vulkan driver; without a GPU that is Mesa 24.3 "
                "or newer, which scripts/maniskill.sh installs"
            ) from error

    def _check_arm_start(self, start: str) -> None:
        if start != "home":
            raise BlmError(f"ManiSkill starts at 'home', not '{start}'; collect with random_starts 0")

    def _check_variation(self, variation: Variation) -> None:
        if variation != NO_VARIATION:
            raise BlmError(
                f"ManiSkill's scenes cannot be varied, and this episode asks for {variation.to_json()}"
            )

    def _start_episode(self, seed: int, draw: SceneDraw, arm_start: str) -> None:
        self.restart()

    def restart(self) -> None:
        """Return to the start of the episode.

        The scene is rebuilt, because PhysX keeps contact state: a used scene would evolve
        differently.
        """
        self.simulation.reset(seed=self._seed, options={"reconfigure": True})
        self._steps = 0
        self._cameras = {}  # cameras belong to the old scene

    def _simulate(self, target: FloatArray) -> None:
        with self._timed("physics"):
            self.simulation.step(to_maniskill(target))

    @property
    def at_start(self) -> bool:
        """Whether no step was taken in this episode."""
        return self._steps == 0

    def state(self) -> NDArray[np.float32]:
        """Joint positions [rad] and measured gripper opening, float32 [8]."""
        return np.append(self._joints()[:-2], self.gripper_opening).astype(np.float32)

    @property
    def gripper_opening(self) -> float:
        """Measured gripper opening: 0 closed .. 1 open."""
        return float(np.clip(self._joints()[-2:].mean() / self.robot.gripper.stroke, 0.0, 1.0))

    def tcp(self) -> tuple[FloatArray, FloatArray]:
        """Return world position [3] and rotation [3, 3] of the tool centre point; see `TaskEnv.tcp`."""
        pose = self.simulation.agent.tcp.pose.to_transformation_matrix()[0].cpu().numpy()
        return pose[:3, 3].astype(np.float64), pose[:3, :3].astype(np.float64)

    def objects(self) -> dict[str, ObjectState]:
        """Return the present state of every item by our name; fixed items have no speed."""
        return {item.name: self._object(item) for item in self.items}

    def is_grasping(self, name: str) -> bool:
        """Apply ManiSkill's rule: both fingers press with >= 0.5 N within 85 deg of the axis."""
        return bool(self.simulation.agent.is_grasping(self._actor(name)))

    def arm_speed(self) -> float:
        return float(self.simulation.agent.robot.get_qvel()[0, self._arm].abs().max())

    def evaluate(self) -> dict[str, bool]:
        """Return the conditions by our names: ManiSkill's if it reports them, else ours.

        "success" is always ManiSkill's.
        """
        theirs = self.simulation.evaluate()
        known = {ours: bool(theirs[name]) for ours, name in self._maniskill_task.flags.items()}
        return super().evaluate() | known | {"success": bool(theirs["success"])}

    def picture(self, camera: str, size: int | None = None) -> ImageArray:
        """Return uint8 [size, size, 3] of a camera at its pose in our scene.

        Unlike ManiSkill's own sensors, these cameras show PickCube's goal.
        """
        lookup("camera", camera, CAMERAS)
        with self._timed("rendering"):
            view = self._camera(camera, size or self.image_size)
            self.simulation.scene.update_render(update_sensors=False, update_human_render_cameras=False)
            view.capture()
            rgb = view.get_obs(depth=False, position=False, segmentation=False)["rgb"]
            return np.ascontiguousarray(rgb[0].cpu().numpy(), dtype=np.uint8)

    def close(self) -> None:
        self._cameras = {}
        self.simulation.close()

    def _camera(self, name: str, size: int) -> Any:
        """Return a camera of the present scene; it is created on first use with a fixed resolution."""
        if (name, size) not in self._cameras:
            from mani_skill.sensors.camera import Camera, CameraConfig
            from mani_skill.utils.sapien_utils import look_at

            if (where := CAMERAS[name]) is None:
                mount = self.robot.wrist_camera
                hand = self.simulation.agent.robot.links_map[_HAND]
                pose = look_at(mount.eye, mount.target, up=(1, 0, 0))
                fovy = mount.fovy
            else:
                x, y = self.task_spec.region(self.robot).centre
                shift = np.array([x + self.task_spec.view_shift, y, 0.0])
                hand = None
                pose = look_at(*(np.add(point, shift) for point in where[:2]))
                fovy = where[2]
            lens = CameraConfig(f"{name}-{size}", pose, size, size, np.radians(fovy), *_RANGE, mount=hand)
            self._cameras[name, size] = Camera(lens, self.simulation.scene)
        return self._cameras[name, size]

    def _joints(self) -> FloatArray:
        """Return the positions of the arm joints [rad] and the two fingers [m], [9]."""
        return np.asarray(self.simulation.agent.robot.get_qpos()[0].cpu().numpy(), dtype=np.float64)

    def _actor(self, name: str) -> Any:
        return getattr(self.simulation, lookup("object", name, self._maniskill_task.objects))

    def _object(self, item: Item) -> ObjectState:
        actor = self._actor(item.name)
        place, turn = (part[0].cpu().numpy().astype(np.float64) for part in (actor.pose.p, actor.pose.q))
        speed = spin = 0.0
        if item.role == "free":
            speed, spin = (float(v.norm()) for v in (actor.linear_velocity, actor.angular_velocity))
        return ObjectState(item.name, item.kind, item.color, place, turn, item.parts[0].size, speed, spin)
