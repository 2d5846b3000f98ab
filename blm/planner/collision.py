"""Collision checking of one arm against itself, the table and the items of a task.

Distances are MuJoCo's distances between primitive shapes. Items that may be touched are ignored. An
item in the hand moves rigidly with the tool and is checked against everything else. World frame: x
forward from the robot, y left, z up. Units: m and rad.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import mink
import mujoco
import numpy as np
from numpy.typing import NDArray

from blm.robots import RobotSpec, add_robot
from blm.tasks import ObjectState
from blm.tasks.scene import SHAPES
from blm.tasks.spec import Item
from blm.types import lookup

Vector = NDArray[np.floating[Any]]

TOUCH = 0.003
"""Penetration depth that still counts as contact and not as a collision [m].

An arm that rests on the table must be able to move away from it.
"""
PRESSED = 0.01
"""The same for a held item on the table [m]: it stands there, and its grasp is not exact."""
CLEARANCE = 0.025
"""Distance kept from items if there is room [m]: servos lag behind and cut corners."""
SPARE = 0.005
"""Extra distance kept by sampled paths [m], of which some is lost between checked points."""
_ARM = 1
"""Collision bit of the arm."""
_FAR = 2
"""Collision bit of the links that a held item must not hit."""
_GROUND = 4
"""Collision bit of the table and the robot's base."""
_ITEM = 8
"""Collision bit of the items."""
_HELD = 16
"""Collision bit of the held item."""


class CollisionWorld:
    """The collision model of one arm and the items of a task. Markers do not collide."""

    def __init__(self, robot: RobotSpec, items: Sequence[Item] = ()) -> None:
        spec = mujoco.MjSpec()
        spec.worldbody.add_geom(name="table", type=mujoco.mjtGeom.mjGEOM_PLANE, size=(2, 2, 0.1))
        add_robot(spec, robot)
        solid = [item for item in items if item.role != "marker"]
        for item in solid:  # on free joints, because MuJoCo skips contacts between two fixed bodies
            body = spec.worldbody.add_body(name=item.name)
            body.add_freejoint(name=item.name)
            for part in item.parts:
                body.add_geom(
                    type=SHAPES[part.shape], size=part.size, pos=part.position, margin=CLEARANCE + SPARE
                )
        model = self._model = spec.compile()
        self._data = mujoco.MjData(model)
        self._robot, self._dof = robot, len(robot.home)
        self._low, self._high = model.jnt_range[: self._dof].T
        self._hand, self._tcp = model.body("hand").id, model.site("tcp").id
        self._items = {
            item.name: np.flatnonzero(model.geom_bodyid == model.body(item.name).id) for item in solid
        }
        self._is_item = np.isin(model.geom_bodyid, [model.body(item.name).id for item in solid])
        self._is_ground = model.geom_bodyid <= model.body("base").id
        solid_arm = (model.geom_contype > 0) & ~self._is_item & ~self._is_ground
        far = solid_arm & (
            model.geom_bodyid < self._hand - 1
        )  # a held item touches the hand and may touch the wrist
        model.geom_contype[solid_arm] = _ARM
        model.geom_conaffinity[solid_arm] = _ARM
        model.geom_contype[far] |= _FAR
        ground = self._is_ground & (model.geom_contype > 0)
        model.geom_contype[ground] = _GROUND
        model.geom_conaffinity[ground] = _ARM
        self.update({}, touches=self._items)

    def update(
        self,
        objects: Mapping[str, ObjectState],
        *,
        touches: Collection[str] = (),
        carried: str = "",
        tool: mink.SE3 | None = None,
        opening: float = 1.0,
    ) -> None:
        """Set the measured item poses, which later checks use until the next call.

        `touches` names items to ignore. `carried` names the item in the hand; its pose relative to
        the hand is the measured one, with the tool at `tool`. `opening` is the gripper opening
        (0 closed .. 1 open). Raises UnknownNameError for a name that is not an item.
        """
        for name in (*touches, *((carried,) if carried else ())):
            lookup("item", name, self._items)
        model, data = self._model, self._data
        data.qpos[self._dof : self._dof + 2] = opening * self._robot.gripper.stroke
        for name, geoms in self._items.items():
            bits = (_HELD, _ITEM | _GROUND | _FAR) if name == carried else (_ITEM, _ARM)
            model.geom_contype[geoms], model.geom_conaffinity[geoms] = (0, 0) if name in touches else bits
            if name in objects:
                state = objects[name]
                data.joint(name).qpos[:] = (*state.position, *state.quaternion)
        self._carried = None
        if carried:
            assert tool is not None, "the pose of a carried item in the hand follows from the tool's pose"
            state = objects[carried]
            pose = mink.SE3.from_rotation_and_translation(
                mink.SO3(np.array(state.quaternion)), state.position
            )
            grip = tool.inverse() @ pose
            self._carried = data.joint(carried), grip.translation(), grip.rotation().wxyz

    def spare_distance(self, q: Vector, clearance: float = 0.0) -> float:
        """Return the smallest distance in excess of the required one at joints `q` [m].

        It is negative for a collision and infinite if nothing is near. The required distance is
        `clearance` (at most CLEARANCE + SPARE) from items, and -TOUCH from the table and the arm.
        """
        model, data = self._model, self._data
        data.qpos[: self._dof] = np.clip(q, self._low, self._high)
        mujoco.mj_kinematics(model, data)
        if self._carried is not None:
            joint, offset, turn = self._carried
            pose = np.empty(7)
            mujoco.mju_rotVecQuat(pose[:3], offset, data.xquat[self._hand])
            pose[:3] += data.site_xpos[self._tcp]
            mujoco.mju_mulQuat(pose[3:], data.xquat[self._hand], turn)
            joint.qpos[:] = pose
            mujoco.mj_kinematics(model, data)
        mujoco.mj_collision(model, data)
        if not data.ncon:
            return np.inf
        pairs = data.contact.geom
        with_item = self._is_item[pairs].any(axis=1)
        on_ground = self._is_ground[pairs].any(axis=1)
        required = np.where(with_item, np.where(on_ground, -PRESSED, clearance), -TOUCH)
        return float((data.contact.dist - required).min())
