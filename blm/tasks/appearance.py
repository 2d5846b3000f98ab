"""Domain randomisation of the appearance: colours, light and cameras vary, the physics does not.

It is for training data; the standard evaluation scenes have the plain appearance.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import mujoco
import numpy as np

from blm.types import BlmError

_STREAM = 4
"""Number of this random stream of an episode; `TaskEnv` uses streams 0 to 3."""
_TASK_SHARE = 0.3
"""Factor of the colour change of task items, because instructions name their colours."""


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """Amplitudes of the randomisation of a scene's appearance; 0 means no variation."""

    colors: float = 0.0
    """Maximum change of each colour channel of the table and the robot, 0..1."""
    light: float = 0.0
    """Maximum relative change of the light's brightness, 0..1.
    Its direction changes by at most the same number [rad]."""
    camera: float = 0.0
    """Standard deviation of the position of third-person cameras [m], 0..0.2.
    The standard deviation of their direction is a tenth of this number [rad]."""

    def __post_init__(self) -> None:
        if not all(0 <= value <= most for value, most in zip(astuple(self), (1, 1, 0.2), strict=True)):
            raise BlmError(f"appearance needs colors and light in 0..1 and camera in 0..0.2 m, got {self}")


PLAIN = Appearance()
"""No randomisation."""


class AppearanceRandomizer:
    """Randomises the appearance of one compiled model in place."""

    def __init__(self, model: mujoco.MjModel, appearance: Appearance) -> None:
        self._model = model
        self._appearance = appearance
        self._rgba = model.geom_rgba.copy()
        self._positions = model.cam_pos.copy()
        self._quaternions = model.cam_quat.copy()
        self._lights = {name: getattr(model, name).copy() for name in ("light_diffuse", "light_dir")}
        robot_end = model.body("right_finger").id
        self._share = np.where(model.geom_bodyid <= robot_end, 1.0, _TASK_SHARE)[:, None]
        self._fixed = np.flatnonzero(model.cam_bodyid == 0)

    def apply(self, seed: int) -> None:
        """Apply the appearance of the episode `seed`; distractors keep their colours."""
        if self._appearance == PLAIN:
            return
        model = self._model
        vary = self._appearance
        rng = np.random.default_rng((seed, _STREAM))
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
