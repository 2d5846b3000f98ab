"""The ids of the environments for `gymnasium.make`: "blm/PickCube-Panda-v0".

They are registered when `blm.tasks` is imported, which `gymnasium.make` does by itself for
"blm.tasks:blm/PickCube-Panda-v0". `blm.evaluation.gymnasium_envs` makes the environments.
"""

from __future__ import annotations

NAMESPACE = "blm"
ROBOT_IDS = {"panda": "Panda", "xarm6": "XArm6", "xarm7": "XArm7", "widowxai": "WidowXAI"}
"""Robot -> its part of an id."""
TASK_IDS = {
    "push_cube": "PushCube",
    "pull_cube": "PullCube",
    "pick_cube": "PickCube",
    "stack_cube": "StackCube",
    "place_sphere": "PlaceSphere",
    "lift_peg_upright": "LiftPegUpright",
}
"""Task of suite24 -> its part of an id."""


def environments() -> dict[str, dict[str, object]]:
    """Return all ids, and what each of them gives to `blm.evaluation.gymnasium_envs.make`.

    For each robot and task there are the plain suite ("blm/PickCube-Panda-v0"), the scenes in which
    only the words decide ("blm/PickCubeWords-Panda-v0"), and the suite with one perturbation, which
    needs the arguments `axis` and `level` ("blm/PickCubePlus-Panda-v0").
    """
    kinds: tuple[tuple[str, str, bool], ...] = (
        ("", "", False),
        ("Words", "words_", False),
        ("Plus", "", True),
    )
    return {
        f"{NAMESPACE}/{task_id}{kind}-{robot_id}-v0": {
            "robot": robot,
            "task": f"{prefix}{task}",
            "perturbed": perturbed,
        }
        for kind, prefix, perturbed in kinds
        for task, task_id in TASK_IDS.items()
        for robot, robot_id in ROBOT_IDS.items()
    }


def register() -> None:
    """Register all environments with Gymnasium, once."""
    from gymnasium.envs.registration import register as add
    from gymnasium.envs.registration import registry

    for name, arguments in environments().items():
        if name not in registry:
            add(id=name, entry_point="blm.evaluation.gymnasium_envs:make", kwargs=dict(arguments))
