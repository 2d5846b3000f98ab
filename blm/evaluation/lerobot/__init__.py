"""Our environments for LeRobot's own commands, which load this package as a plug-in.

    lerobot-eval --env.discover_packages_path=blm.evaluation.lerobot --env.type=blm \
        --env.task=PickCube-Panda-v0 --policy.path=..

It needs LeRobot 0.4 and runs in LeRobot's environment. Nothing else in this package imports it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

from blm.gymnasium_ids import NAMESPACE, environments
from blm.robots import ROBOTS
from blm.types import lookup

PLUGIN = f"{NAMESPACE}-lerobot"
"""Namespace of ids whose environments have no wrappers, because LeRobot reads the instruction from an
attribute of the environment itself."""


@EnvConfig.register_subclass("blm")
@dataclass
class BlmEnv(EnvConfig):
    """The environment of a robot and a task of the suite: `--env.type=blm --env.task=PickCube-Panda-v0`.

    Its episodes end at the first success. `lerobot-eval --seed=0` runs the scenes of our evaluation
    (seeds 0 to 9,999); the scenes of LeRobot's default seed, 1000, are among them.
    """

    task: str | None = "PickCube-Panda-v0"
    fps: int = 20
    episode_length: int = 200
    cameras: list[str] = field(default_factory=lambda: ["base", "side", "wrist"])
    """Those of our datasets, and so of the policies that LeRobot trains on them."""
    image_size: int = 112
    axis: str = ""
    """Perturbation of the tasks with "Plus"; see `blm.evaluation.gymnasium_envs.make`."""
    level: int = 0

    def __post_init__(self) -> None:
        """Raises UnknownNameError, which lists the valid tasks."""
        names = {name.removeprefix(f"{NAMESPACE}/"): kinds for name, kinds in environments().items()}
        kinds = lookup("task", self.task or "", names)
        dim = ROBOTS[str(kinds["robot"])].action_space.dim
        picture = PolicyFeature(FeatureType.VISUAL, (self.image_size, self.image_size, 3))
        self.features = {
            "action": PolicyFeature(FeatureType.ACTION, (dim,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (dim,)),
            **{f"pixels/{camera}": picture for camera in self.cameras},
        }
        self.features_map = {
            "action": "action",
            "agent_pos": "observation.state",
            **{f"pixels/{camera}": f"observation.images.{camera}" for camera in self.cameras},
        }
        if self.gym_id not in gymnasium.registry:
            gymnasium.register(
                id=self.gym_id,
                entry_point="blm.evaluation.gymnasium_envs:make",
                kwargs=dict(kinds),
                order_enforce=False,
            )

    @property
    def package_name(self) -> str:
        """Namespace of the ids."""
        return PLUGIN

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of `gymnasium.make`."""
        settings = {"cameras": tuple(self.cameras), "image_size": self.image_size}
        perturbation = {"axis": self.axis, "level": self.level} if self.axis else {}
        return {**settings, **perturbation, "max_steps": self.episode_length}
