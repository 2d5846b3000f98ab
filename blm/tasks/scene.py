"""Builds the MuJoCo model of a scene: robot, items, distractors, table, light, cameras.

With these contact settings, scripted grasps held in 100 of 100 trials on each arm. Friction and
density of items are ManiSkill's.
"""

from __future__ import annotations

from collections.abc import Sequence

import mujoco
import numpy as np

from blm.robots import RobotSpec, add_robot, camera_quaternion
from blm.tasks.spec import PALETTE, Item, Part, TaskSpec, Vector

SUBSTEPS = 25
"""Number of physics steps (2 ms) in a control step (50 ms)."""
SHAPES = {
    "box": mujoco.mjtGeom.mjGEOM_BOX,
    "sphere": mujoco.mjtGeom.mjGEOM_SPHERE,
    "cylinder": mujoco.mjtGeom.mjGEOM_CYLINDER,
}
CAMERAS: dict[str, tuple[Vector, Vector, float] | None] = {
    "base": ((0.80, 0.58, 0.55), (0.075, 0.01, 0.12), 27.5),
    "side": ((0.41, -0.85, 0.55), (0.03, -0.03, 0.127), 28.5),
    "wrist": None,
}
"""Third-person cameras: eye, target [m from the workspace's centre], field of view [deg].

The field of view is the vertical one. They show PickCube's space and most of PushCube's targets at
less than 5 mm per pixel (table, 112 px). Base and side are 100 deg apart in azimuth, so together
they give depth. The wrist camera belongs to the robot.
"""
ROLLING = (0.3, 0.005, 0.0005)
"""Sliding, torsional and rolling friction of a ball. Without rolling friction it would never stop."""
WALL_COLOR: Vector = (0.55, 0.60, 0.66)
"""Colour of the sky, which stands for the wall behind the table."""
TABLE_COLOR: Vector = (0.78, 0.70, 0.60)
TILE = 128
"""Side of the textures of table and wall [px]; the table shows four tiles, each 0.75 m wide."""
WALL_TEXTURE, TABLE_TEXTURE = 0, 1
"""Numbers of these textures in a dressed model."""
_SHADOW_MAP = 512
"""Side of the shadow map of a dressed model [px]."""


def build_model(
    robot: RobotSpec, task: TaskSpec, distractors: int, *, dressed: bool = False, solid: int = 0
) -> mujoco.MjModel:
    """Compile the scene.

    Bodies have the names of items; distractors (hidden at first) "distractor0"..., the `solid` ones
    last. A `dressed` scene looks and moves the same, and can also show textures and shadows.
    """
    spec = mujoco.MjSpec()
    _set_options(spec)
    _add_room(spec, dressed)
    x, y = view_centre(robot, task)
    for name, view in CAMERAS.items():
        if view is not None:
            eye, target = ((point[0] + x, point[1] + y, point[2]) for point in view[:2])
            pose = camera_quaternion(eye, target, (0, 0, 1))
            spec.worldbody.add_camera(name=name, pos=eye, quat=pose, fovy=view[2])
    add_robot(spec, robot)
    unseen = (Part("box", (0.02, 0.02, 0.02), "white", position=(0, 0, -1)),)
    for item in (
        *task.items(robot),
        *(Item(f"distractor{i}", "", "", unseen, "marker") for i in range(distractors)),
        *(
            Item(f"distractor{i}", "", "", (Part("box", (0.02, 0.02, 0.02), "white"),))
            for i in range(distractors, distractors + solid)
        ),
    ):
        _add_item(spec, item)
    return spec.compile()


def view_centre(robot: RobotSpec, task: TaskSpec) -> tuple[float, float]:
    """Return the point of the table, x and y [m], to which the third-person cameras are relative."""
    x, y = task.region(robot).centre
    return x + task.view_shift, y


def paint_items(model: mujoco.MjModel, items: Sequence[Item], tint: Vector = (0.0, 0.0, 0.0)) -> None:
    """Give the geoms of these items their present colours, those of objects changed by `tint` [0..1]."""
    for item in items:
        change = np.zeros(4) if item.role == "marker" else np.array([*tint, 0.0])
        for geom, part in enumerate(item.parts, start=model.body(item.name).geomadr[0]):
            model.geom_rgba[geom] = np.clip(PALETTE[part.color] + change, 0, 1)


def _set_options(spec: mujoco.MjSpec) -> None:
    option, geom, visual = spec.option, spec.default.geom, spec.visual
    option.timestep = 0.002
    option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    option.cone, option.impratio = mujoco.mjtCone.mjCONE_ELLIPTIC, 10
    option.jacobian = mujoco.mjtJacobian.mjJAC_DENSE  # MuJoCo 4.0.0 solves sparse ones wrongly
    geom.solref, geom.solimp = (0.01, 1), (0.95, 0.99, 0.001, 0.5, 2)
    geom.friction, geom.density = (0.3, 0.005, 0.0001), 1000
    visual.quality.shadowsize = visual.quality.offsamples = (
        0  # each costs more than everything else in software rendering
    )
    visual.quality.numslices, visual.quality.numstacks = 12, 6
    visual.headlight.ambient = visual.headlight.diffuse = (0.35, 0.35, 0.35)
    visual.headlight.specular = (0.05, 0.05, 0.05)
    visual.map.znear = 0.01


def _add_room(spec: mujoco.MjSpec, dressed: bool) -> None:
    light = spec.worldbody.add_light(dir=(-0.3, 0.35, -1), castshadow=False)
    light.type = mujoco.mjtLightType.mjLIGHT_DIRECTIONAL
    light.diffuse, light.specular = (0.45, 0.45, 0.45), (0.05, 0.05, 0.05)
    table = spec.worldbody.add_geom(name="table", type=SHAPES["box"], size=(0.75, 0.75, 0.02))
    table.pos, table.rgba = (-0.15, 0, -0.02), (*TABLE_COLOR, 1.0)
    side = TILE if dressed else 8
    sky = spec.add_texture(name="sky", type=mujoco.mjtTexture.mjTEXTURE_SKYBOX, width=side, height=6 * side)
    sky.builtin = mujoco.mjtBuiltin.mjBUILTIN_FLAT
    sky.rgb1 = WALL_COLOR
    sky.rgb2 = WALL_COLOR
    if dressed:
        _add_table_texture(spec, table)


def _add_table_texture(spec: mujoco.MjSpec, table: mujoco.MjsGeom) -> None:
    """Give the table a white texture, which leaves its colour as it is, and the scene a shadow map."""
    texture = spec.add_texture(name="table", type=mujoco.mjtTexture.mjTEXTURE_2D, width=TILE, height=TILE)
    texture.builtin = mujoco.mjtBuiltin.mjBUILTIN_FLAT
    texture.rgb1 = texture.rgb2 = (1, 1, 1)
    material = spec.add_material(name="table", texrepeat=(2, 2))
    material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "table"
    table.material = "table"
    spec.visual.quality.shadowsize = _SHADOW_MAP
    spec.visual.map.shadowclip = 0.5  # share of the scene that the map covers: 1.1 m around the workspace


def _add_item(spec: mujoco.MjSpec, item: Item) -> None:
    body = spec.worldbody.add_body(name=item.name, mocap=item.role != "free")
    if item.role == "free":
        body.add_freejoint(name=item.name)
    for part in item.parts:
        geom = body.add_geom(type=SHAPES[part.shape], size=part.size, pos=part.position)
        geom.rgba, geom.condim = PALETTE[part.color], 4
        geom.contype = geom.conaffinity = int(item.role != "marker")
        if part.shape == "sphere":
            geom.condim, geom.friction = 6, ROLLING
