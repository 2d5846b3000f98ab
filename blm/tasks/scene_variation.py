"""Shows a `Variation` in a compiled scene by editing the model in place, which costs milliseconds.

Compiling a model and opening a renderer cost a second, so an environment keeps one plain model, which is
never edited here, and one dressed model for each number of solid distractors. Every edit starts from the
values as compiled.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import mujoco
import numpy as np

from blm.robots import RobotSpec
from blm.robots.build import FINGERS
from blm.tasks.distractors import Distractors
from blm.tasks.scene import (
    ROLLING,
    SHAPES,
    TABLE_COLOR,
    TABLE_TEXTURE,
    TILE,
    WALL_COLOR,
    WALL_TEXTURE,
    build_model,
    paint_items,
    view_centre,
)
from blm.tasks.spec import PALETTE, Item, Part, TaskSpec, Vector
from blm.tasks.textures import render_texture
from blm.tasks.variation import (
    PLAIN,
    CameraShift,
    Clutter,
    Dynamics,
    Lighting,
    SensorNoise,
    Surface,
    Variation,
)
from blm.types import FloatArray, ImageArray

_EDITED = (
    *("geom_type", "geom_size", "geom_pos", "geom_rbound", "geom_aabb", "geom_rgba", "geom_friction"),
    *("geom_condim", "bvh_aabb", "body_mass", "body_inertia", "body_ipos", "cam_pos", "cam_quat"),
    *("cam_fovy", "light_diffuse", "light_specular", "light_dir", "light_pos", "light_castshadow"),
    *("mat_rgba", "actuator_gainprm", "actuator_biasprm"),
)
"""Arrays of the model that a variation edits."""
_HEADLIGHT = ("ambient", "diffuse", "specular")
_DENSITY = 1000.0
"""Density of items [kg/m^3]; see `blm.tasks.scene`."""
_WARM = np.array([0.25, 0.0, -0.4])
"""Change of the light's colour channels at warmth 1."""
_LAMP = 1.2
"""Distance from which a shadow is cast [m]."""
_WHITE: Vector = (1.0, 1.0, 1.0)


def needs_dressing(variation: Variation) -> bool:
    """Whether a variation changes the model, and not only sensors, arm, control or the goal's pose."""
    physics = variation.dynamics
    kept = Dynamics(mass=physics.mass, friction=physics.friction, grip_force=physics.grip_force)
    return replace(variation, arm_offset=0.0, sensors=SensorNoise(), dynamics=kept) != PLAIN


class SceneModel:
    """A compiled scene and its state."""

    def __init__(self, robot: RobotSpec, task: TaskSpec, ghosts: int, solid: int | None) -> None:
        """Compile the plain scene if `solid` is None, else a dressed one with solid distractors."""
        self.model = build_model(robot, task, ghosts, dressed=solid is not None, solid=solid or 0)
        self.data = mujoco.MjData(self.model)
        self.is_dressed = solid is not None
        self.textures: Mapping[int, Hashable] = {}
        """Number -> what the texture shows; empty for the plain scene."""
        self.shadows = False
        self._view = np.array([*view_centre(robot, task), 0.0])
        self._compiled = {name: getattr(self.model, name).copy() for name in _EDITED}
        self._headlight = {name: getattr(self.model.vis.headlight, name).copy() for name in _HEADLIGHT}

    def dress(self, variation: Variation, items: Sequence[Item], distractors: Distractors) -> None:
        """Show a variation, whose `items` have their sizes already; `mj_resetData` must follow."""
        for name, values in self._compiled.items():
            getattr(self.model, name)[:] = values
        for item in items:
            if item.role != "marker":
                self._shape_item(item, variation.clutter, variation.dynamics.mass)
        for item, _ in distractors:
            if item.role != "marker":
                self._shape_distractor(item)
        self._paint(variation, items)
        self._move_cameras(variation.camera)
        self._set_light(variation.light)
        self._set_dynamics(variation.dynamics)
        self._cover(variation)
        mujoco.mj_setConst(self.model, self.data)

    # --- geometry and physics ---

    def _shape_item(self, item: Item, clutter: Clutter, mass: float) -> None:
        """Scale the geoms of a task's object; its mass follows, and is multiplied by `mass` if it is free."""
        model, scale = self.model, clutter.scale
        body = model.body(item.name).id
        for geom, part in enumerate(item.parts, start=model.body_geomadr[body]):
            model.geom_size[geom], model.geom_pos[geom] = part.size, part.position
            model.geom_rbound[geom] *= scale
            model.geom_aabb[geom] *= scale
        self._tree(body)[:] *= scale
        model.body_ipos[body] *= scale
        heavier = mass if item.role == "free" else 1.0
        model.body_mass[body] *= heavier * scale**3
        model.body_inertia[body] *= heavier * scale**5

    def _shape_distractor(self, item: Item) -> None:
        model, part = self.model, item.parts[0]
        body = model.body(item.name).id
        geom = model.body_geomadr[body]
        mass, inertia, half = _solid(part)
        model.geom_type[geom], model.geom_size[geom] = SHAPES[part.shape], part.size
        model.geom_rgba[geom] = PALETTE[part.color]
        model.geom_rbound[geom] = np.linalg.norm(part.size)
        model.geom_aabb[geom, 3:] = half
        self._tree(body)[:, 3:] = half
        model.body_mass[body], model.body_inertia[body] = mass, inertia
        if part.shape == "sphere":
            model.geom_condim[geom], model.geom_friction[geom] = 6, ROLLING

    def _tree(self, body: int) -> FloatArray:
        """Return the bounding boxes of a body's collision tree, a view [N, 6] (centre, half extents)."""
        first = self.model.body_bvhadr[body]
        return self.model.bvh_aabb[first : first + self.model.body_bvhnum[body]]

    def _set_dynamics(self, dynamics: Dynamics) -> None:
        model = self.model
        model.geom_friction[:, 0] *= dynamics.friction
        grip = model.actuator("gripper").id
        model.actuator_gainprm[grip] *= dynamics.grip_force
        model.actuator_biasprm[grip] *= dynamics.grip_force

    # --- looks ---

    def _paint(self, variation: Variation, items: Sequence[Item]) -> None:
        model = self.model
        owner = model.geom_bodyid
        robot = (owner > 0) & (owner <= model.body(FINGERS[1]).id)
        model.geom_rgba[robot, :3] = np.clip(model.geom_rgba[robot, :3] + variation.robot_tint, 0, 1)
        paint_items(model, items, variation.clutter.tint)

    def _move_cameras(self, shift: CameraShift) -> None:
        model = self.model
        turn = np.array([np.cos(shift.azimuth / 2), 0.0, 0.0, np.sin(shift.azimuth / 2)])
        for camera in np.flatnonzero(model.cam_bodyid == 0):
            turned, place = np.empty(4), np.empty(3)
            mujoco.mju_mulQuat(turned, turn, model.cam_quat[camera])
            mujoco.mju_rotVecQuat(place, model.cam_pos[camera] - self._view, turn)
            model.cam_quat[camera] = turned
            model.cam_pos[camera] = self._view + place + shift.offset
            model.cam_fovy[camera] *= shift.field_of_view

    def _set_light(self, light: Lighting) -> None:
        model, color = self.model, light_color(light)
        for name in _HEADLIGHT:
            getattr(model.vis.headlight, name)[:] = self._headlight[name] * color
        model.light_diffuse[:] *= color
        model.light_specular[:] *= color
        about_x, about_y = light.direction
        for lamp in range(model.nlight):
            model.light_dir[lamp] = _rotated(model.light_dir[lamp], about_x, about_y)
            model.light_pos[lamp] = self._view - _LAMP * model.light_dir[lamp]
        model.light_castshadow[:] = self.shadows = light.shadows

    def _cover(self, variation: Variation) -> None:
        """Set the textures of table and wall, and compute those that changed.

        No lamp lights the wall, which is a sky: the light's colour is part of its texture.
        """
        model, table, wall = self.model, variation.table, variation.wall
        color = table.color or TABLE_COLOR
        model.geom_rgba[model.geom("table").id, :3] = model.mat_rgba[0, :3] = (
            _WHITE if table.pattern else color
        )
        light: Vector = (*light_color(variation.light).tolist(),)
        textures = {
            TABLE_TEXTURE: _Texture(table, color) if table.pattern else _Texture(Surface(), _WHITE),
            WALL_TEXTURE: _Texture(wall, wall.color or WALL_COLOR, light),
        }
        for number, texture in textures.items():
            if self.textures.get(number) != texture:
                first, wide = model.tex_adr[number], number == TABLE_TEXTURE
                image = texture.render(TILE) if wide else np.tile(texture.render(TILE // 2), (12, 2, 1))
                model.tex_data[first : first + image.size] = image.ravel()
        self.textures = textures


class _Texture(NamedTuple):
    """What a texture shows."""

    surface: Surface
    color: Vector
    """First colour."""
    light: Vector = _WHITE
    """Factor of the colour channels."""

    def render(self, side: int) -> ImageArray:
        """Return uint8 [side, side, 3]."""
        image = render_texture(self.surface, self.color, side) * np.array(self.light)
        return (255 * np.clip(image, 0, 1)).round().astype(np.uint8)


def light_color(light: Lighting) -> FloatArray:
    """Return the factor of each colour channel of the light, [3]."""
    return light.brightness * (1 + light.warmth * _WARM)


def _solid(part: Part) -> tuple[float, tuple[float, float, float], tuple[float, float, float]]:
    """Return mass [kg], diagonal inertia [kg m^2] and half extents [m] of a shape of an item's density."""
    a, b, c = part.size
    if part.shape == "sphere":
        mass = _DENSITY * 4 / 3 * np.pi * a**3
        return mass, (0.4 * mass * a**2,) * 3, (a, a, a)
    if part.shape == "cylinder":
        mass = _DENSITY * np.pi * a**2 * 2 * b
        across = mass * (3 * a**2 + 4 * b**2) / 12
        return mass, (across, across, mass * a**2 / 2), (a, a, b)
    mass = _DENSITY * 8 * a * b * c
    return (
        mass,
        (mass * (b * b + c * c) / 3, mass * (a * a + c * c) / 3, mass * (a * a + b * b) / 3),
        (a, b, c),
    )


def _rotated(vector: FloatArray, about_x: float, about_y: float) -> FloatArray:
    """Return a vector [3] rotated about the world's x axis and then about its y axis [rad]."""
    (cx, sx), (cy, sy) = ((np.cos(angle), np.sin(angle)) for angle in (about_x, about_y))
    x, y, z = vector
    y, z = cx * y - sx * z, sx * y + cx * z
    return np.array([cy * x + sy * z, y, cy * z - sy * x])
