"""The wordings of every kind of question: those trained on, and those kept for evaluation.

The held-out ones use words that the seen ones teach. `{...}` are filled from a fact. A multiple choice
puts its options on lines of its own after any of these.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Wording = Literal["seen", "held_out"]


class Wordings(NamedTuple):
    """What one kind of question may be called."""

    seen: tuple[str, ...]
    held_out: tuple[str, ...]


_POINT = Wordings(
    (
        "Point to the {thing} in the {camera} view.",
        "Where is the {thing} in the {camera} view?",
        "Give the point of the {thing} in the {camera} view.",
    ),
    ("In the {camera} view, point to the {thing}.",),
)
_BOX = Wordings(
    (
        "Draw a box around the {thing} in the {camera} view.",
        "Give the box of the {thing} in the {camera} view.",
        "Which box holds the {thing} in the {camera} view?",
    ),
    ("In the {camera} view, draw a box around the {thing}.",),
)
_DISCRIMINATIVE = Wordings(
    (
        "Is this step possible now: {step}?",
        "Can the robot {step} now?",
        "Step: {step}. Is it what the robot can do now?",
    ),
    ("Now, can the robot {step}?", "Is it possible to {step} now?"),
)
_SUCCESS = Wordings(
    (
        "Step: {step}. Is it finished?",
        "Is this finished: {step}?",
        "Did the robot finish this: {step}?",
    ),
    ("Is the robot finished with this step: {step}?",),
)

TEMPLATES: dict[str, Wordings] = {
    "existence": Wordings(
        (
            "Is there a {thing} on the table?",
            "Can you see a {thing}?",
            "Does the table have a {thing} on it?",
        ),
        ("Is a {thing} on the table?",),
    ),
    "attribute_color": Wordings(
        ("What colour is the {thing}?", "Which colour is the {thing}?", "Tell the colour of the {thing}."),
        ("The {thing} is of which colour?",),
    ),
    "attribute_shape": Wordings(
        (
            "What shape is the {thing} object?",
            "Which shape is the {thing} object?",
            "Tell the shape of the {thing} object.",
        ),
        ("The {thing} object is of which shape?",),
    ),
    "affordance_held": Wordings(
        (
            "Is the gripper holding the {thing}?",
            "Can the gripper let go of the {thing} now?",
            "Is the {thing} in the gripper?",
        ),
        ("Is the {thing} what the gripper is holding?",),
    ),
    "affordance_room": Wordings(
        (
            "Is there room for another object on the {thing}?",
            "Can an object be put on the {thing} now?",
            "Is the {thing} free?",
        ),
        ("Is there room on the {thing} now?",),
    ),
    "affordance_roll": Wordings(
        ("Which object can roll?", "What rolls when it is pushed?", "Name the object that can roll."),
        ("Which object rolls when it is pushed?",),
    ),
    "location_table": Wordings(
        (
            "In which part of the table is the {thing}: left, middle or right?",
            "Is the {thing} on the left, in the middle or on the right of the table?",
            "Which part of the table has the {thing}: left, middle or right?",
        ),
        ("Is the {thing} in the left, middle or right part of the table?",),
    ),
    "location_state": Wordings(
        ("Where is the {thing}?", "What is the {thing} on or in?", "Tell where the {thing} is."),
        ("Where is the {thing} now?",),
    ),
    "location_goal": Wordings(
        (
            "Is the {thing} in the air or on the table?",
            "Where is the {thing}: in the air or on the table?",
            "On the table or in the air: where is the {thing}?",
        ),
        ("Is the {thing} on the table or in the air?",),
    ),
    "left_right": Wordings(
        (
            "Is the {thing} left or right of the {other}?",
            "On which side of the {other} is the {thing}, left or right?",
            "Left or right: where is the {thing} from the {other}?",
        ),
        ("Is the {thing} on the left or right side of the {other}?",),
    ),
    "front_behind": Wordings(
        (
            "Is the {thing} in front of or behind the {other}?",
            "Front or behind: where is the {thing} from the {other}?",
            "Where is the {thing}, behind or in front of the {other}?",
        ),
        ("Is the {thing} behind or in front of the {other}?",),
    ),
    "above": Wordings(
        (
            "Is the gripper above or below the {thing}?",
            "Above or below: where is the gripper from the {thing}?",
            "Where is the gripper, below or above the {thing}?",
        ),
        ("Is the gripper below or above the {thing}?",),
    ),
    "counting": Wordings(
        (
            "How many {thing}s are on the table?",
            "Count the {thing}s on the table.",
            "What is the number of {thing}s on the table?",
        ),
        ("How many {thing}s does the table have on it?",),
    ),
    "comparing_nearest": Wordings(
        (
            "Which object is nearest to the {thing}?",
            "What is nearest to the {thing}?",
            "Name the object nearest to the {thing}.",
        ),
        ("Tell which object is nearest to the {thing}.",),
    ),
    "comparing_farthest": Wordings(
        (
            "Which object is farthest from the {thing}?",
            "What is farthest from the {thing}?",
            "Name the object farthest from the {thing}.",
        ),
        ("Tell which object is farthest from the {thing}.",),
    ),
    "comparing_closer": Wordings(
        (
            "Which is nearer to the {goal}: the {thing} or the {other}?",
            "The {thing} or the {other}: which is nearer to the {goal}?",
            "Is the {thing} or the {other} nearer to the {goal}?",
        ),
        ("Which object is nearer to the {goal}, the {thing} or the {other}?",),
    ),
    "situated_left_right": Wordings(
        (
            "You are the gripper. Is the {thing} on your left or right?",
            "Is the {thing} left or right of the gripper?",
            "From the gripper, is the {thing} left or right?",
        ),
        ("From the gripper, is the {thing} on the left or right?",),
    ),
    "situated_front_behind": Wordings(
        (
            "You are the gripper. Is the {thing} in front of you or behind you?",
            "Is the {thing} in front of or behind the gripper?",
            "From the gripper, is the {thing} in front or behind?",
        ),
        ("You are the gripper. Is the {thing} behind you or in front of you?",),
    ),
    "situated_move": Wordings(
        (
            "Which way must the gripper move most to reach the {thing}?",
            "You are the gripper. Which way is it most to the {thing}?",
            "What way does the gripper go most to reach the {thing}?",
        ),
        ("To reach the {thing}, which way must the gripper move most?",),
    ),
    "forecasting_direction": Wordings(
        (
            "The {thing} will be brought to the {goal}. Which way will it go?",
            "Which way will the {thing} go when it is brought to the {goal}?",
            "The robot brings the {thing} to the {goal}. Which way does it move?",
        ),
        ("When the {thing} is brought to the {goal}, which way does it go?",),
    ),
    "forecasting_touch": Wordings(
        (
            "Will the gripper touch the {thing} in the next half second?",
            "In the next half second, will the gripper touch the {thing}?",
            "Half a second from now, will the {thing} be touched?",
        ),
        ("Will the {thing} be touched in the next half second?",),
    ),
    "point_base": _POINT,
    "point_side": _POINT,
    "point_wrist": _POINT,
    "box_base": _BOX,
    "box_side": _BOX,
    "box_wrist": _BOX,
    "metric_position": Wordings(
        (
            "What is the position of the {thing} in cm?",
            "Give the position of the {thing} in cm.",
            "Where is the {thing} from the robot in cm?",
        ),
        ("Tell the position of the {thing} in cm.",),
    ),
    "metric_gripper_to_object": Wordings(
        (
            "How must the gripper move to the {thing} in cm?",
            "Give the way from the gripper to the {thing} in cm.",
            "What is the way from the gripper to the {thing} in cm?",
        ),
        ("Tell the way from the gripper to the {thing} in cm.",),
    ),
    "metric_object_to_goal": Wordings(
        (
            "How must the {thing} move to the {goal} in cm?",
            "Give the way from the {thing} to the {goal} in cm.",
            "What is the way from the {thing} to the {goal} in cm?",
        ),
        ("Tell the way from the {thing} to the {goal} in cm.",),
    ),
    "metric_gripper_distance": Wordings(
        (
            "How far is the gripper from the {thing}?",
            "How far is it from the gripper to the {thing}?",
            "Give the distance between the gripper and the {thing}.",
        ),
        ("What is the distance between the gripper and the {thing}?",),
    ),
    "metric_goal_distance": Wordings(
        (
            "How far is the {thing} from the {goal}?",
            "How far is it from the {thing} to the {goal}?",
            "Give the distance between the {thing} and the {goal}.",
        ),
        ("What is the distance between the {thing} and the {goal}?",),
    ),
    "metric_height": Wordings(
        (
            "How high is the {thing} above the table?",
            "Give the height of the {thing} above the table.",
            "What is the height of the {thing} above the table?",
        ),
        ("Tell the height of the {thing} above the table.",),
    ),
    "discriminative_affordance_positive": _DISCRIMINATIVE,
    "discriminative_affordance_negative": _DISCRIMINATIVE,
    "success_positive": _SUCCESS,
    "success_negative": _SUCCESS,
    "generative_affordance": Wordings(
        ("Which step is possible now?", "What can the robot do now?", "Name the step that is possible now."),
        ("Which step can the robot do now?",),
    ),
    "future_prediction": Wordings(
        (
            "Which step comes after this one?",
            "What will the robot do after this step?",
            "Name the step after this one.",
        ),
        ("After this step, what will the robot do?",),
    ),
    "past_description": Wordings(
        (
            "Which step came before this one?",
            "What did the robot do before this step?",
            "Name the step before this one.",
        ),
        ("Which step did the robot do before this one?",),
    ),
    "remaining_steps": Wordings(
        (
            "Which steps remain after this one?",
            "List the steps that remain after this one.",
            "What remains to do after this step?",
        ),
        ("After this step, which steps remain?",),
    ),
    "planning": Wordings(
        (
            "Task: {task} What is the plan from now on?",
            "Task: {task} List the steps from now on.",
            "Plan the steps from now on for this task: {task}",
        ),
        ("Task: {task} Plan the steps from now on.",),
    ),
    "planning_with_context": Wordings(
        (
            "Task: {task} At least this is finished: {done}. Which step is to do now?",
            "Finished: {done}, maybe more. Task: {task} What to do now?",
            "Task: {task} Finished, maybe with more: {done}. Name the step to do now.",
        ),
        ("Task: {task} Finished: {done}, maybe more. Which step is to do now?",),
    ),
}
