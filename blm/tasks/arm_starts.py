"""Initial arm poses away from home, drawn until the arm touches nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mujoco
import numpy as np

from blm.robots.build import FINGERS
from blm.types import BlmError

if TYPE_CHECKING:
    from blm.tasks.env import Env

_ATTEMPTS = 5000
"""Number of arm poses that are tried."""
_LOWEST = 0.02
"""Minimum height of the tool after an offset of the joints [m]."""


def random_start(env: Env, rng: np.random.Generator) -> None:
    """Draw an arm pose near home: tool above the workspace, pointing down, no contact."""
    area, home = env.robot.workspace, np.array(env.robot.home)
    for _ in range(_ATTEMPTS):
        env.place_arm(home + rng.uniform(-0.7, 0.7, len(home)), opening=float(rng.uniform()))
        mujoco.mj_kinematics(env.model, env.data)
        position, rotation = env.tcp()
        inside = (np.abs(position[:2] - area.centre) <= area.half + 0.05).all()
        if inside and 0.05 <= position[2] <= area.height + 0.1 and rotation[2, 2] < -0.8 and _is_free(env):
            return
    raise BlmError(f"found no free arm pose for '{env.embodiment}' in {_ATTEMPTS} draws")


def offset_start(env: Env, rng: np.random.Generator, norm: float) -> None:
    """Move the joints by `norm` [rad] in a random direction, within their limits and without contact."""
    start = env.data.qpos[: len(env.robot.home)].copy()
    low, high = np.array([(joint.low, joint.high) for joint in env.robot.joints]).T
    for _ in range(_ATTEMPTS):
        direction = rng.normal(size=len(start))
        angles = start + norm * direction / np.linalg.norm(direction)
        if (angles < low).any() or (angles > high).any():
            continue
        env.place_arm(angles, opening=1.0)
        mujoco.mj_kinematics(env.model, env.data)
        if env.tcp()[0][2] >= _LOWEST and _is_free(env):
            return
    raise BlmError(f"found no free arm pose {norm} rad from the start of '{env.embodiment}'")


def _is_free(env: Env) -> bool:
    """Whether the robot touches nothing; the kinematics must be up to date."""
    owners = env.model.geom_bodyid
    robot = (owners > 0) & (owners <= env.model.body(FINGERS[1]).id)
    mujoco.mj_collision(env.model, env.data)
    return not robot[env.data.contact.geom].any()
