"""Random looks: colours, light and cameras vary from episode to episode, the physics does not.

For data that a policy should not overfit to. Evaluation scenes are plain.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import mujoco
import numpy as np

from blm.types import BlmError

_STREAM = 4
"""Place of the looks among an episode's random streams (see Env.reset)."""
_TASK_SHARE = 0.3
"""Items of the task change colour by this share only: instructions name their colours."""


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """How much the looks vary; 0 is not at all."""

    colors: float = 0.0
    """Greatest change of the red, green and blue of table and robot, 0..1."""
    light: float = 0.0
    """Greatest change of the brightness, as a share; the light's direction turns by up to as many rad."""
    camera: float = 0.0
    """Standard deviation of a third-person camera's position [m]; a tenth of it, of its direction [rad]."""

    def __post_init__(self) -> None:
        if not all(0 <= value <= most for value, most in zip(astuple(self), (1, 1, 0.2), strict=True)):
            raise BlmError(f"appearance needs colors and light in 0..1 and camera in 0..0.2 m, got {self}")


PLAIN = Appearance()


class Look:
    """The looks of one compiled model, which it changes in place and can always bring back."""

    def __init__(self, model: mujoco.MjModel, appearance: Appearance) -> None:
        self._model, self._appearance = model, appearance
        self._rgba, self._positions = model.geom_rgba.copy(), model.cam_pos.copy()
        self._quaternions = model.cam_quat.copy()
        self._lights = {name: getattr(model, name).copy() for name in ("light_diffuse", "light_dir")}
        robot_end = model.body("right_finger").id
        self._share = np.where(model.geom_bodyid <= robot_end, 1.0, _TASK_SHARE)[:, None]
        self._fixed = np.flatnonzero(model.cam_bodyid == 0)

    def change(self, seed: int) -> None:
        """Give the episode of `seed` its looks; distractors keep the colours that they were dressed in."""
        if self._appearance == PLAIN:
            return
        model, vary, rng = self._model, self._appearance, np.random.default_rng((seed, _STREAM))
        tint = self._share * rng.uniform(-1, 1, (model.nbody, 3))[model.geom_bodyid] * vary.colors
        plain = np.array([not model.body(body).name.startswith("distractor") for body in model.geom_bodyid])
        model.geom_rgba[plain, :3] = np.clip(self._rgba[:, :3] + tint, 0, 1)[plain]
        model.light_diffuse[:] = self._lights["light_diffuse"] * (1 + vary.light * rng.uniform(-1, 1))
        model.light_dir[:] = self._lights["light_dir"] + vary.light * rng.uniform(-1, 1, (model.nlight, 3))
        model.cam_pos[self._fixed] = self._positions[self._fixed] + rng.normal(
            0, vary.camera, (len(self._fixed), 3)
        )
        for camera in self._fixed:
            turned = self._quaternions[camera].copy()
            mujoco.mju_quatIntegrate(turned, rng.normal(0, vary.camera / 10, 3), 1.0)
            model.cam_quat[camera] = turned
