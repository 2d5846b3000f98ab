"""What an arm would hit at given joint positions: itself, the table, the items of a task.

Distances are MuJoCo's between primitive shapes. An item that may be touched is not looked at; the one in the
hand moves rigidly with the tool, and its own distances to the others count. World frame, m, rad.
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
"""Depth of a contact that is no collision yet [m]: an arm that rests on the table must get away."""
PRESSED = 0.01
"""The same for the item in the hand on the table: it stands there, and its grip is not exact."""
CLEARANCE = 0.025
"""Distance kept from items on the way where there is room [m]: servos trail their targets and cut corners."""
SPARE = 0.005
"""Distance kept beyond it by ways that are sampled [m]: between the points that are checked some is lost."""
_ARM, _FAR, _GROUND, _ITEM, _HELD = 1, 2, 4, 8, 16
"""Collision bits: arm; its links that a held item must not hit; table and base; items; the held item."""


class Scene:
    """The collision model of one arm and a task's items; markers are left out."""

    def __init__(self, robot: RobotSpec, items: Sequence[Item] = ()) -> None:
        spec = mujoco.MjSpec()
        spec.worldbody.add_geom(name="table", type=mujoco.mjtGeom.mjGEOM_PLANE, size=(2, 2, 0.1))
        add_robot(spec, robot)
        solid = [item for item in items if item.role != "marker"]
        for item in solid:  # all on free joints: MuJoCo looks for no contacts between bodies that are fixed
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
        far = solid_arm & (model.geom_bodyid < self._hand - 1)  # a held item touches the hand, may the wrist
        model.geom_contype[solid_arm], model.geom_conaffinity[solid_arm] = _ARM, _ARM
        model.geom_contype[far] |= _FAR
        ground = self._is_ground & (model.geom_contype > 0)
        model.geom_contype[ground], model.geom_conaffinity[ground] = _GROUND, _ARM
        self.place({}, touches=self._items)

    def place(
        self,
        objects: Mapping[str, ObjectState],
        *,
        touches: Collection[str] = (),
        carried: str = "",
        tool: mink.SE3 | None = None,
        opening: float = 1.0,
    ) -> None:
        """Put the items where they were measured, for all questions until the next call.

        `touches` are not looked at. `carried` hangs in the hand as measured with the tool at `tool`. The
        fingers are `opening` (0 closed .. 1) apart. Raises BlmError for a name that is no item.
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
            assert tool is not None, "where a carried item hangs follows from where the tool was"
            state = objects[carried]
            pose = mink.SE3.from_rotation_and_translation(
                mink.SO3(np.array(state.quaternion)), state.position
            )
            grip = tool.inverse() @ pose
            self._carried = data.joint(carried), grip.translation(), grip.rotation().wxyz

    def gap(self, q: Vector, clearance: float = 0.0) -> float:
        """Least distance to spare at joints `q` [m]; negative: a collision; infinite: nothing is near.

        To be spared: `clearance` (at most CLEARANCE + SPARE) from items, -TOUCH from table and self.
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
        with_item, on_ground = self._is_item[pairs].any(axis=1), self._is_ground[pairs].any(axis=1)
        wanted = np.where(with_item, np.where(on_ground, -PRESSED, clearance), -TOUCH)
        return float((data.contact.dist - wanted).min())
