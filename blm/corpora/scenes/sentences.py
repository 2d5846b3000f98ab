"""Answers in plain English, for backbones that already speak it.

nano learns its language from these questions, so its answers are as short as possible and come
after a thought. A pretrained model that is trained on such answers loses its own way of speaking.
With sentences, a question is answered in one, unless it asks for the answer only (`BRIEF`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from blm.types import base_kind

Answers = Literal["reasoning", "terse", "sentence"]
BRIEF = "Give the answer only."
"""Instruction of a question whose answer is no sentence; evaluation asks all questions with it."""
YES_NO = {
    "existence": ("there is a {thing}", "there is no {thing}"),
    "affordance_held": ("the gripper is holding the {thing}", "the gripper is not holding the {thing}"),
    "affordance_room": ("there is room on the {thing}", "there is no room on the {thing}"),
    "forecasting_touch": ("the gripper will touch the {thing}", "the gripper will not touch the {thing}"),
    "discriminative_affordance": ("this step is possible now", "this step is not possible now"),
    "success": ("this step is finished", "this step is not finished"),
}
"""Base kind -> the ends of the sentences that begin with yes and no."""
SENTENCES = {
    "attribute_color": "The {thing} is {answer}.",
    "attribute_shape": "The {thing} object is a {answer}.",
    "affordance_roll": "The {answer} can roll.",
    "location_table": "The {thing} is in the {answer} part of the table.",
    "location_state": "The {thing} is {answer}.",
    "location_goal": "The {thing} is {answer}.",
    "left_right": "The {thing} is to the {answer} of the {other}.",
    "front_behind": "The {thing} is {answer} the {other}.",
    "above": "The gripper is {answer} the {thing}.",
    "counting": "The number of {thing}s is {answer}.",
    "comparing_nearest": "The {answer} is nearest to the {thing}.",
    "comparing_farthest": "The {answer} is farthest from the {thing}.",
    "comparing_closer": "The {answer} is closer to the {goal}.",
    "situated_left_right": "The {thing} is to the {answer} of the gripper.",
    "situated_front_behind": "The {thing} is {answer} the gripper.",
    "situated_move": "The gripper must mostly move {answer} to reach the {thing}.",
    "forecasting_direction": "The {thing} will move {answer}.",
    "metric_position": "The {thing} is at {answer}.",
    "metric_gripper_to_object": "The gripper must move by {answer} to reach the {thing}.",
    "metric_object_to_goal": "The {thing} must move by {answer} to reach the {goal}.",
    "metric_gripper_distance": "The {thing} is {answer} from the gripper.",
    "metric_goal_distance": "The {thing} is {answer} from the {goal}.",
    "metric_height": "The {thing} is {answer} above the table.",
    "generative_affordance": "The robot can {answer} now.",
    "future_prediction": "The next step is: {answer}.",
    "past_description": "The step before was: {answer}.",
    "remaining_steps": "The remaining steps are: {answer}.",
    "planning": "The steps from now on are: {answer}.",
    "instruction_object": "The {answer} is to be moved.",
    "instruction_goal": "The goal is the {answer}.",
    "instruction_end": "The {answer} must be up.",
    "planning_with_context": "The step to do now is: {answer}.",
}
"""Base kind -> the sentence around an answer."""
POINT, BOX = "The {thing} is at {answer}.", "The box around the {thing} is {answer}."


def sentence(kind: str, answer: str, words: Mapping[str, str]) -> str:
    """Return the answer to a question of this kind as a sentence.

    `words` filled the question's template. Raises KeyError for a kind without a sentence.
    """
    stem = base_kind(kind)
    if stem in YES_NO:
        end = YES_NO[stem][answer == "no"].format(**words)
        return f"{answer.capitalize()}, {end.replace(' a orange', ' an orange')}."
    if stem in ("front_behind", "situated_front_behind") and answer == "front":
        answer = "in front of"
    form = POINT if stem.startswith("point_") else BOX if stem.startswith("box_") else SENTENCES[stem]
    return form.format(answer=answer, **words)
