"""Suggested questions about a scene, in the wording of Stage I's training data.

Kinds and wording are those of `blm.corpora`, which a server does not import; a test compares them.
"""

from __future__ import annotations

from blm.tasks import Env
from blm.types import FloatArray

QUESTIONS = {
    "next": "What can the robot do now?",
    "colour": "What colour is the {thing}?",
    "held": "Is the gripper holding the {thing}?",
    "table": "In which part of the table is the {thing}: left, middle or right?",
    "side": "Is the {thing} left or right of the {other}?",
    "depth": "Is the {thing} in front of or behind the {other}?",
    "roll": "Which object can roll?",
    "air": "Is the {thing} in the air or on the table?",
    "way": "Which way will the {thing} go when it is brought to the {other}?",
    "height": "How high is the {thing} above the table?",
    "distance": "How far is the {thing} from the {other}?",
    "count": "How many {thing}s are on the table?",
    "other": "Is there a {thing} on the table?",
    "point": "Point to the {thing} in the {camera} view.",
}
"""Kind -> question template."""

_TO_TARGET: tuple[tuple[str, dict[str, str]], ...] = (
    ("next", {}),
    ("point", {"thing": "blue cube"}),
    ("way", {"thing": "blue cube", "other": "target"}),
    ("table", {"thing": "blue cube"}),
    ("distance", {"thing": "blue cube", "other": "target"}),
    ("colour", {"thing": "cube"}),
)
_TO_NAMED: tuple[tuple[str, dict[str, str]], ...] = (
    ("next", {}),
    ("point", {"thing": "{cube}"}),
    ("depth", {"thing": "{cube}", "other": "{other}"}),
    ("side", {"thing": "{cube}", "other": "{other}"}),
    ("count", {"thing": "cube"}),
    ("held", {"thing": "{cube}"}),
)
BY_TASK: dict[str, tuple[tuple[str, dict[str, str]], ...]] = {
    "push_cube": _TO_TARGET,
    "pull_cube": _TO_TARGET,
    "pick_cube": (
        ("next", {}),
        ("point", {"thing": "red cube"}),
        ("air", {"thing": "goal"}),
        ("height", {"thing": "goal"}),
        ("held", {"thing": "red cube"}),
        ("other", {"thing": "green cube"}),
    ),
    "stack_cube": (
        ("next", {}),
        ("point", {"thing": "green cube"}),
        ("side", {"thing": "red cube", "other": "green cube"}),
        ("depth", {"thing": "red cube", "other": "green cube"}),
        ("distance", {"thing": "red cube", "other": "green cube"}),
        ("held", {"thing": "red cube"}),
    ),
    "place_sphere": (
        ("next", {}),
        ("roll", {}),
        ("point", {"thing": "white bin"}),
        ("side", {"thing": "blue ball", "other": "white bin"}),
        ("table", {"thing": "blue ball"}),
        ("held", {"thing": "blue ball"}),
    ),
    "lift_peg_upright": (
        ("next", {}),
        ("point", {"thing": "red and blue peg"}),
        ("height", {"thing": "gripper"}),
        ("count", {"thing": "cube"}),
        ("other", {"thing": "red cube"}),
    ),
    "words_push_cube": _TO_NAMED,
    "words_pull_cube": _TO_NAMED,
    "words_pick_cube": (*_TO_NAMED, ("air", {"thing": "goal"}), ("height", {"thing": "goal"})),
    "words_stack_cube": (
        ("next", {}),
        ("point", {"thing": "{cube}"}),
        ("side", {"thing": "{cube}", "other": "{lower}"}),
        ("depth", {"thing": "{cube}", "other": "{lower}"}),
        ("held", {"thing": "{cube}"}),
    ),
    "words_place_sphere": (
        ("next", {}),
        ("point", {"thing": "{bin}"}),
        ("side", {"thing": "{ball}", "other": "{other_ball}"}),
        ("depth", {"thing": "{ball}", "other": "{bin}"}),
        ("table", {"thing": "{ball}"}),
        ("held", {"thing": "{ball}"}),
    ),
    "words_lift_peg_upright": (
        ("next", {}),
        ("point", {"thing": "{peg}"}),
        ("height", {"thing": "gripper"}),
        ("count", {"thing": "cube"}),
    ),
}
"""Task -> kinds of its questions and the fields of their templates, most interesting first.

{..} stands for the label of an item."""

MIN_GAP = 0.05
"""Minimum distance of objects for questions about sides [m]; nearer, answers are unclear."""
MIDDLE, OUTSIDE = 0.02, 0.08
"""Distances from the table's centre line [m]: maximum of the middle, minimum of the sides."""


def suggested_questions(env: Env) -> list[str]:
    """Return the questions that have one clear answer in the present state."""
    task = BY_TASK.get(env.task, (("next", {}),))
    things = env.objects()
    places = {thing.label: thing.position for thing in things.values()}
    labels = {name: thing.label for name, thing in things.items()}
    camera = env.cameras[0]
    filled = [(kind, {k: name.format(**labels) for k, name in about.items()}) for kind, about in task]
    return [
        QUESTIONS[kind].format(**about, camera=camera)
        for kind, about in filled
        if _is_clear(kind, about, places, env)
    ]


def _is_clear(kind: str, about: dict[str, str], places: dict[str, FloatArray], env: Env) -> bool:
    if kind in ("side", "depth"):
        x, y, _ = abs(places[about["thing"]] - places[about["other"]])
        return bool((y if kind == "side" else x) >= MIN_GAP)
    if kind == "way":  # unclear once the object is at its goal
        return bool(max(abs(places[about["thing"]] - places[about["other"]])[:2]) >= MIN_GAP)
    if kind == "table":
        off = abs(places[about["thing"]][1] - env.task_spec.region(env.robot).centre[1])
        return not MIDDLE < off < OUTSIDE
    return True
