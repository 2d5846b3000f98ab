"""Builds the MuJoCo model of a scene: robot, items, distractors, table, light, cameras.

With these contact settings, scripted grasps held in 100 of 100 trials on each arm. Friction and
density of items are ManiSkill's.
"""

from __future__ import annotations

from collections.abc import Sequence

import mujoco

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
_SKY, _TABLE = (0.55, 0.60, 0.66), (0.78, 0.70, 0.60, 1.0)


def build_model(robot: RobotSpec, task: TaskSpec, distractors: int) -> mujoco.MjModel:
    """Compile the scene.

    Bodies have the names of items; distractors (hidden at first) "distractor0"...
    """
    spec = mujoco.MjSpec()
    _set_options(spec)
    _add_room(spec)
    x, y = task.region(robot).centre
    x += task.view_shift
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
    ):
        _add_item(spec, item)
    return spec.compile()


def paint_items(model: mujoco.MjModel, items: Sequence[Item]) -> None:
    """Give the geoms of these items their present colours."""
    for item in items:
        first = model.body(item.name).geomadr[0]
        for number, part in enumerate(item.parts):
            model.geom_rgba[first + number] = PALETTE[part.color]


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


def _add_room(spec: mujoco.MjSpec) -> None:
    light = spec.worldbody.add_light(dir=(-0.3, 0.35, -1), castshadow=False)
    light.type = mujoco.mjtLightType.mjLIGHT_DIRECTIONAL
    light.diffuse, light.specular = (0.45, 0.45, 0.45), (0.05, 0.05, 0.05)
    table = spec.worldbody.add_geom(name="table", type=SHAPES["box"], size=(0.75, 0.75, 0.02))
    table.pos, table.rgba = (-0.15, 0, -0.02), _TABLE
    sky = spec.add_texture(name="sky", type=mujoco.mjtTexture.mjTEXTURE_SKYBOX, width=8, height=48)
    sky.builtin = mujoco.mjtBuiltin.mjBUILTIN_FLAT
    sky.rgb1 = _SKY
    sky.rgb2 = _SKY


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
