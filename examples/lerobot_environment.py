"""Our environments in LeRobot's own loop, with LeRobot's Python; `lerobot-eval` does the same.

    sh scripts/lerobot.sh                                        # once
    .venv-lerobot/bin/python examples/lerobot_environment.py outputs/act/checkpoints/last/pretrained_model

Put beside a policy on the hub as `env.py`, this file is also an environment of LeRobot's EnvHub:
`make_env("USER/REPOSITORY", trust_remote_code=True)` calls the function `make_env` below. EnvHub runs
code from the hub; the plug-in of `lerobot-eval` runs only what is installed.
"""

from __future__ import annotations

import sys
from typing import Any

from lerobot.envs import factory

from blm.evaluation.lerobot import BlmEnv


def make_env(n_envs: int = 1, use_async_envs: bool = False, cfg: BlmEnv | None = None) -> dict[str, Any]:
    """Return {"blm": {0: vector environment}}, as EnvHub expects it."""
    return factory.make_env(cfg or BlmEnv(), n_envs=n_envs, use_async_envs=use_async_envs)


def main(folder: str, episodes: int = 2) -> None:
    """Print LeRobot's measures of a policy in two scenes of PushCube."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.envs.factory import make_env_pre_post_processors
    from lerobot.policies.factory import make_policy, make_pre_post_processors
    from lerobot.scripts.lerobot_eval import eval_policy

    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = folder
    side = next(iter(config.image_features.values())).shape[-1]
    world = BlmEnv(task="PushCube-Panda-v0", image_size=side)
    policy = make_policy(config, env_cfg=world)
    before, after = make_pre_post_processors(config, pretrained_path=folder)
    first, last = make_env_pre_post_processors(world, config)
    env = make_env(cfg=world)["blm"][0]
    result = eval_policy(
        env, policy, first, last, before, after, n_episodes=episodes, start_seed=0
    )  # seeds 0 to 9,999 are the scenes of our evaluation
    print(result["aggregated"])
    env.close()


if __name__ == "__main__":
    main(sys.argv[1])
