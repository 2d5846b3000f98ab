"""Free questions about the task of a scene: its goal, its first step, whether it is done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from blm.corpora.scenes.free_words import FreeQuestion, SceneInWords
from blm.corpora.scenes.questions import ON_DISC
from blm.tasks import TASKS
from blm.types import KeyFacts

DEEDS = {
    "push_cube": "push the {object} {to}",
    "pull_cube": "pull the {object} {to}",
    "pick_cube": "lift the {object} and bring it {to}",
    "stack_cube": "put the {object} {to}",
    "place_sphere": "put the {object} {to}",
    "lift_peg_upright": "stand the {object} upright",
}
"""Task without its prefix "words_" -> what the robot has to do."""
_ON, _IN, _AT = ("onto", "on"), ("into", "in"), ("to", "at")
_PREPOSITIONS = {"disc": _ON, "cube": _ON, "bin": _IN, "sphere": _AT}
"""Kind of goal -> words of the motion and of the place."""
UNCLEAR = {"disc": 0.13, "sphere": 0.06}
"""Kind of goal marker -> distance up to which it is unclear whether the object is there [m]."""
_MOVES = "carr*|mov*|bring*|tak*|plac*|put*|lower*|lift*|go*|releas*|drop*|set*"
_BEGINS = (
    "approach*|reach*|mov*|go|goes|get*|grasp*|grab*|pick*|tak*|touch*|position*|locat*|push*|pull*|lift*"
)
_ENDS = "done|already|nothing|finished|complete*|still|stay*|wait*|stop*|releas*|let go"

Progress = Literal["start", "held", "done", "unclear"]


def progress(words: SceneInWords) -> Progress:
    """Return how far the task of a scene is."""
    scene = words.scene
    goal, item = scene.goal, scene.object
    if not item.seen or (goal is not None and not goal.seen):
        return "unclear"
    if words.held and not TASKS[scene.task].prehensile:
        return "unclear"
    near = 1.0 if goal is None else float(np.linalg.norm(item.position - goal.position))
    if goal is not None and goal.kind in UNCLEAR:
        if goal.kind == "disc" and not words.held:
            near = float(np.linalg.norm((item.position - goal.position)[:2]))
            if near <= ON_DISC:
                return "done"
        if near <= UNCLEAR[goal.kind]:
            return "unclear"
    return "held" if words.held else "done" if scene.arrangement == "done" else "start"


def resting_place(words: SceneInWords) -> str:
    """Return where the task's object belongs, e.g. "on the green cube"; empty without a goal."""
    goal = words.scene.goal
    return f"{_PREPOSITIONS[goal.kind][1]} the {goal.label}" if goal is not None else ""


def task_questions(words: SceneInWords) -> Iterator[FreeQuestion]:
    """Yield the questions about the instruction of a scene, which they quote."""
    scene = words.scene
    name = scene.task.removeprefix("words_")
    if name not in DEEDS:
        return
    state = progress(words)
    item, goal = scene.object, scene.goal
    to = f"{_PREPOSITIONS[goal.kind][0]} the {goal.label}" if goal is not None else ""
    deed = DEEDS[name].format(object=item.label, to=to)
    top = scene.naming.words.get("top")
    deed += f" with its {top} end up" if top else ""
    named = {"task": scene.instruction, "object": item.label, "deed": deed, "to": to}
    named |= {"place": resting_place(words)}
    aim = goal.label if goal is not None else "upright|stand*|up|vertical*|end"
    others = tuple(t.label for t in scene.objects if t.role == "other" and t.kind != "end")
    there = tuple(sorted({*words.things, item.label, *([goal.label] if goal is not None else [])}))

    def ask(kind: str, *required: str, variant: str = "") -> FreeQuestion:
        wrong = () if kind == "free_done" else others
        return FreeQuestion(kind, KeyFacts(required=required, forbidden=wrong, things=there), named, variant)

    yield ask("free_task", item.label, aim, *([top] if top else []))
    if goal is not None:
        yield ask("free_goal", aim)
    if state != "unclear":
        yield ask("free_done", "yes" if state == "done" else "no", variant=state)
        steps = {"start": (item.label, _BEGINS, aim), "held": (aim, _MOVES), "done": (_ENDS,)}
        yield ask("free_first_step", *steps[state], variant=state)
