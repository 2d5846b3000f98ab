"""The steps of recorded episodes, and what is asked about them and thought first."""

from __future__ import annotations

import numpy as np
import pytest

from blm.corpora.scenes.episodes import AFTER, BEFORE, IN_TASK, frame_annotations, read_steps
from blm.planner.decompositions import DECOMPOSITIONS
from blm.tasks import TASKS
from blm.tasks.naming import Naming
from blm.tasks.task_env import draw_scene
from blm.types import BlmError
from tests.support.recorded import recorded

PICK = ("approach", "descend", "grasp", "lift", "move", "release", "retreat", "hold")
PEG = ("approach", "descend", "grasp", "lift", "turn", "place", "release", "hold")
RUNS = {
    "push_cube": ("approach", "push", "hold"),
    "pull_cube": ("approach", "pull", "hold"),
    "lift_peg_upright": PEG,
}
RUNS |= {f"words_{task}": runs for task, runs in RUNS.items()}


def test_every_primitive_has_a_step():
    assert IN_TASK.keys() == DECOMPOSITIONS.keys() == TASKS.keys()
    with pytest.raises(BlmError, match="juggle"):
        read_steps("pick_cube", ["juggle"] * 5, np.zeros(5, bool))
    with pytest.raises(BlmError, match="unknown"):
        read_steps("unknown", ["approach"], np.zeros(1, bool))


def test_steps_of_an_episode():
    labels, solved = recorded()
    steps = read_steps("pick_cube", labels, solved)
    assert steps.names == ("approach", "grasp", "move", "hold") and steps.regular
    assert steps.starts == (0, 8, 21, 37, 47)
    assert (steps.contact, steps.done) == (17, 40)
    assert list(steps.moments(0)) == list(range(8 - BEFORE))
    assert list(steps.moments(1)) == list(range(8 + AFTER, 21 - BEFORE))
    assert list(steps.moments(3)) == list(range(37 + AFTER, 47))
    assert read_steps("pick_cube", labels, solved & False).done == len(labels)
    peg = (
        "approach",
        "descend",
        "grasp",
        "lift",
        "turn",
        "lift",
        "turn",
        "place",
        "release",
        "retreat",
        "hold",
    )
    labels = [name for name in peg for _ in range(5)]
    names = read_steps("lift_peg_upright", labels, np.zeros(55, bool)).names
    assert names == ("approach", "grasp", "lift", "place", "release", "hold")


def test_questions_about_a_moment():
    labels, solved = recorded()
    steps = read_steps("pick_cube", labels, solved)
    annotations = list(frame_annotations(steps, 2, 30, "Lift it."))
    answers = {(annotation.kind, *annotation.words.values()): annotation.answer for annotation in annotations}
    assert answers["generative_affordance",] == "move the red cube to the goal"
    assert answers["future_prediction",] == "hold still"
    assert answers["past_description",] == "grasp the red cube"
    assert answers["remaining_steps",] == "hold"
    assert answers["planning", "Lift it."] == "move, hold"
    assert answers["planning_with_context", "Lift it.", "approach"] == "move the red cube to the goal"
    assert answers["success_positive", "grasp the red cube"] == "yes"
    assert answers["discriminative_affordance_negative", "approach the red cube"] == "no"
    assert ("success_positive", "Lift it") not in answers, "the task is about to be done: not asked"
    assert {f.answer for f in annotations if f.kind == "forecasting_touch"} == set()
    early = {(f.kind, *f.words.values()): f.answer for f in frame_annotations(steps, 0, 3, "Lift it.")}
    assert early["forecasting_touch", "red cube"] == "no"
    assert early["success_negative", "Lift it"] == "no"
    assert early["past_description",] == "nothing"


@pytest.mark.parametrize("task", IN_TASK)
def test_previous_and_next_steps_follow_from_the_sequence(task):
    labels = [name for name in RUNS.get(task, PICK) for _ in range(10)]
    draw = draw_scene("panda", task, 0)
    naming = Naming(draw.words, draw.other_words)
    steps = read_steps(task, labels, np.zeros(len(labels), bool), naming)
    assert steps.regular
    for index in range(len(steps.names)):
        for annotation in frame_annotations(steps, index, steps.starts[index] + 4, "Do it."):
            if not annotation.thought or annotation.kind == "forecasting_touch":
                continue
            thought, _, asked = annotation.thought.partition("; asked ")
            assert asked == (annotation.words["step"] if annotation.kind.startswith("discriminative") else "")
            listed, now = thought.split("; now ")
            names = listed.split(", ")
            phrases = [steps.phrase(name) for name in names]
            at = phrases.index(now)
            step = annotation.words.get("step", "")
            place = phrases.index(step) if step in phrases else len(phrases)
            expected = {
                "past_description": phrases[at - 1] if at else "nothing",
                "future_prediction": [*phrases, "nothing"][at + 1],
                "remaining_steps": ", ".join(names[at + 1 :]) or "nothing",
                "planning": ", ".join(names[at:]),
                "discriminative_affordance_positive": "yes" if place == at else "no",
                "discriminative_affordance_negative": "yes" if place == at else "no",
                "success_positive": "yes" if place < at else "no",
                "success_negative": "yes" if place < at else "no",
            }
            assert (at, names) == (index, [*steps.names]) and annotation.answer == expected[annotation.kind]


def test_steps_that_come_twice_are_not_listed():
    labels = [name for name in ("approach", "push", "approach", "push") for _ in range(10)]
    steps = read_steps("push_cube", labels, np.zeros(40, bool))
    thoughts = {annotation.thought for annotation in frame_annotations(steps, 2, 25, "Do it.")}
    now = steps.phrase("approach")
    assert thoughts == {"", f"now {now}", f"now {now}; asked {now}"}
