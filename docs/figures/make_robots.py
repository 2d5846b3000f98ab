"""Render docs/figures/robots.png: the four arms in their home poses, side by side.

python docs/figures/make_robots.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mujoco
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from blm.robots import ROBOTS, RobotSpec, add_robot, camera_quaternion
from blm.tasks.rendering import Renderer


def portrait(robot: RobotSpec, size: int, azimuth_deg: float) -> Image.Image:
    """Render one arm in its home pose on a plain table, with smoother shapes than in the environment."""
    spec = mujoco.MjSpec()
    spec.visual.quality.numslices, spec.visual.quality.numstacks = 40, 20
    spec.visual.quality.offsamples = 8
    spec.visual.headlight.ambient = (0.38, 0.38, 0.38)
    spec.visual.headlight.diffuse = (0.28, 0.28, 0.28)
    sky = spec.add_texture(name="sky", type=mujoco.mjtTexture.mjTEXTURE_SKYBOX, width=64, height=384)
    sky.builtin, sky.rgb1, sky.rgb2 = mujoco.mjtBuiltin.mjBUILTIN_FLAT, (0.93, 0.95, 0.97), (0.93, 0.95, 0.97)
    table = spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_PLANE, size=(4, 4, 0.1))
    table.rgba = (0.86, 0.88, 0.90, 1)
    light = spec.worldbody.add_light(pos=(1, -1, 3), dir=(-0.4, 0.5, -1), castshadow=False)
    light.type = mujoco.mjtLightType.mjLIGHT_DIRECTIONAL
    light.diffuse = (0.45, 0.45, 0.45)
    add_robot(spec, robot)
    target = (robot.base_position[0] + 0.24, 0, 0.33)
    angle = np.radians(azimuth_deg)
    eye = (target[0] + 1.6 * np.cos(angle), 1.6 * np.sin(angle), 0.7)
    quaternion = camera_quaternion(eye, target, (0, 0, 1))
    spec.worldbody.add_camera(name="portrait", pos=eye, quat=quaternion, fovy=30)
    model = spec.compile()
    data = mujoco.MjData(model)
    data.qpos[: len(robot.home)] = robot.home
    data.qpos[len(robot.home) :] = robot.gripper.stroke
    mujoco.mj_forward(model, data)
    renderer = Renderer(model, size)
    picture = Image.fromarray(renderer.rgb(data, "portrait", size))
    renderer.close()
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("robots.png"))
    parser.add_argument("--size", type=int, default=420)
    parser.add_argument("--azimuth", type=float, default=-50.0)
    args = parser.parse_args()
    sheet = Image.new("RGB", (args.size * len(ROBOTS), args.size + 36), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(20)
    for index, robot in enumerate(ROBOTS.values()):
        sheet.paste(portrait(robot, args.size, args.azimuth), (args.size * index, 0))
        middle = args.size * index + args.size // 2
        draw.text((middle, args.size + 18), robot.title, fill="black", anchor="mm", font=font)
    sheet.save(args.out)


if __name__ == "__main__":
    main()
