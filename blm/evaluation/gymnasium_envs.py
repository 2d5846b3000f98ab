"""The environments behind the ids of `blm.gymnasium_ids`, as `gymnasium.make` makes them."""

from __future__ import annotations

from typing import Any

from blm.evaluation.conditions import PLAIN, Condition
from blm.tasks import EefEnv, Env
from blm.tasks.eef_env import CONTROLS, Control, env_class
from blm.tasks.task_env import EnvObservation, random_seed
from blm.types import BlmError, lookup


def make(
    robot: str,
    task: str,
    *,
    perturbed: bool = False,
    axis: str = "",
    level: int = 0,
    condition: str = "",
    control: Control = "joint",
    render_mode: str | None = "rgb_array",
    **settings: Any,
) -> Env:
    """Return the environment of a robot and a task; `settings` are arguments of `Env`.

    Actions are joint targets, or with `control` "eef" poses of the tool (`EefEnv`).

    A `perturbed` one has a perturbation of suite24-plus in every episode: `axis` and `level`, or the
    name of a `condition` of the axis "dynamics" or "control". It is that of the episode's seed in
    the protocols. Raises BlmError for a perturbation that does not exist, and for one without
    `perturbed`.
    """
    if render_mode not in (None, *Env.metadata["render_modes"]):
        raise BlmError(f"render_mode is '{render_mode}'; it must be one of {Env.metadata['render_modes']}")
    chosen = Condition(axis=axis, level=level, name=condition)
    if perturbed == (chosen == PLAIN):
        raise BlmError(
            f"{chosen}: ids with Plus need axis and level, such as axis='light', level=3, "
            "and others take none"
        )
    lookup("control", control, dict.fromkeys(CONTROLS))
    if perturbed:
        kind = PerturbedEefEnv if control == "eef" else PerturbedEnv
        env: Env = kind(robot, task, condition=chosen, **settings)
    else:
        env = env_class(control)(robot, task, **settings)
    env.render_mode = render_mode  # None: Gymnasium does not let its users render
    return env


class PerturbedEnv(Env):
    """An environment of which every episode has the perturbation of one condition."""

    def __init__(self, robot: str, task: str, *, condition: Condition, **settings: Any) -> None:
        super().__init__(robot, task, **settings)
        self.condition = condition

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[EnvObservation, dict[str, Any]]:
        """Start the episode of `seed`; see `TaskEnv.reset`. The perturbation overrides `options`."""
        seed = random_seed(self.np_random) if seed is None else seed
        wanted = self.condition.reset_options(self.embodiment, self.task, seed)
        return super().reset(seed=seed, options={**(options or {}), **wanted})


class PerturbedEefEnv(PerturbedEnv, EefEnv):
    """The same with poses of the tool as actions."""
